"""Trials before training: of rewards from Python before the model loads, then of the model and of every reward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignprop_core.config.rewards import RewardTerm
from alignprop_core.diffusion.finite import require_finite
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.diffusion.size import UNKNOWN_SIZE
from alignprop_core.errors import ModelError, RewardError, TrialError, UserError, complaint, under
from alignprop_core.mix.term import Term
from alignprop_core.prompts import PromptSet
from alignprop_core.registry.registry import Registry
from alignprop_core.reward import ImageBatch

if TYPE_CHECKING:
    from alignprop_core.training.trainer import Trainer

TRIAL_STEPS = 2
"""Denoising steps of the trial's image: enough to call every network, too few to cost much."""


def try_local(
    terms: Sequence[Term],
    entries: Sequence[RewardTerm],
    registry: Registry,
    *,
    prompts: PromptSet,
    device: torch.device,
    size: tuple[int, int] | None = None,
    where: str = "rewards",
) -> None:
    """Score two images of noise with rewards from Python, a file or a loader, to check that they give a gradient.

    Plugins declare this in their spec and their tests check it; a class written a minute ago may not have a gradient,
    and another environment may lack something that scoring needs. To find out at the first step would cost the time to
    load the model. The images have the size, dtype and range of the run's images; the second has no influence on the
    score of the first, unless the reward mixes samples, such as by a mean over the batch.

    Args:
        terms: the loaded rewards.
        entries: their config entries, in the same order.
        registry: where they were looked up.
        prompts: the run's prompts; the first ones are used.
        device: device of the rewards.
        size: (height, width) in pixels, from `image_size`; None uses `UNKNOWN_SIZE`.
        where: key of the entries in the run config.

    Raises:
        TrialError: naming the term and its key, if it raises, breaks its contract, gives no gradient, or its score or
            gradient is not finite.
    """
    height, width = size or UNKNOWN_SIZE
    # As the sampler decodes: float32 (a float64 model, which no config asks for, would give float64) in [0, 1].
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)
    chosen = [number % len(prompts) for number in range(2)]
    texts: dict[str, Any] = {
        "prompts": [prompts.prompts[i] for i in chosen],
        "metadata": [prompts.metadata[i] for i in chosen],
    }
    whose = "the size of the run's images" if size else "because the model's own size is not known before it loads"
    tried = f"This was a trial before training, with 2 random images of {width}x{height} pixels ({whose})."
    for i, (term, entry) in enumerate(zip(terms, entries, strict=True)):
        if entry.loader is None and registry.local(entry.name) is None:
            continue
        with _trial(f"{where}.{i}.name", tried):
            gradient = _score(term, ImageBatch(images=images, **texts), gradient=term.differentiable)
            if gradient is not None and gradient[1].any():
                raise RewardError(
                    f'Reward "{term.label}": the score of an image depends on the other images of its batch. '
                    "Reduce over pixels, images.mean((1, 2, 3)), never over the batch."
                )


def try_all(trainer: Trainer, terms: Sequence[Term]) -> None:
    """Generate one image at the run's settings, with at most two denoising steps, and score it with every reward.

    What would fail in the first step or in the evaluation after the last one fails in the first seconds: a network that
    does not fit its pipeline, values that are not finite, a reward that raises for the run's prompts.

    Args:
        trainer: the trainer; the first of its prompts is used.
        terms: all rewards that the run trains on or reports.

    Raises:
        ModelError: the model cannot generate an image.
        RunError: the image is not finite.
        TrialError: naming the reward and its key, if it raises, breaks its contract, or its score or gradient is not
            finite.
    """
    config, family, prompts = trainer.config, trainer.sampler.family, trainer.prompts
    steps = min(TRIAL_STEPS, config.sampling.steps)
    sampling = config.sampling.model_copy(update={"steps": steps})
    sampler = Sampler(family.pipeline, sampling, family=type(family)(family.pipeline, sampling))
    text = prompts.prompts[0]
    noise = sampler.noise([text], seed=config.training.seed)
    try:
        with torch.no_grad():
            images = sampler.decode(sampler.sample([text], noise).latents)
    except (RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        with under("model.base"):
            raise ModelError(f"the model loads, but cannot generate an image: {complaint(error)}.") from error
    require_finite(sampler, images, [text], noise)
    tried = f'This was a trial before training, with one image of {steps} denoising steps, for the prompt "{text}".'
    keys = {entry.label: f"evaluation.rewards.{i}.name" for i, entry in enumerate(config.evaluation.rewards)}
    keys |= {entry.label: f"rewards.{i}.name" for i, entry in enumerate(config.rewards)}
    for term in terms:
        trained = term in trainer.mix.terms
        chosen = prompts if trained else trainer.heldout or prompts
        batch = ImageBatch(images=images, prompts=chosen.prompts[:1], metadata=chosen.metadata[:1])
        with _trial(keys.get(term.label), tried):
            _score(term, batch, gradient=trained and term.differentiable)


def _score(term: Term, batch: ImageBatch, *, gradient: bool) -> Tensor | None:
    """Return the gradient of the first score at the images, if it is wanted; score and gradient must be finite."""
    images = batch.images.clone().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        score = term.score(replace(batch, images=images))[0]
    if not score.isfinite():
        raise RewardError(f'Reward "{term.label}" returned a score that is not finite ({score.item()}).')
    if not gradient:
        return None
    with term.placed, term.named("raised in its backward pass"):
        (found,) = torch.autograd.grad(score, images)
    if not found.isfinite().all():
        raise RewardError(f'Reward "{term.label}": its gradient is not finite. Look for a square root or log at zero.')
    return found


@contextmanager
def _trial(key: str | None, tried: str) -> Iterator[None]:
    """Turn a reward's errors into a `TrialError` with its key and what was tried."""
    try:
        yield
    except (UserError, RewardError) as error:
        failed = TrialError(f"{str(error).rstrip('.')}. {tried}")
        failed.key = key
        for note in getattr(error, "__notes__", ()):
            failed.add_note(note)
        raise failed from error
