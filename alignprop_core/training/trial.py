"""The trial before training: the model generates one image, and every reward scores it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alignprop_core.config.model import BackpropConfig
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.errors import RewardError, TrialError, UserError
from alignprop_core.mix.term import Term
from alignprop_core.reward import ImageBatch

if TYPE_CHECKING:
    from alignprop_core.training.trainer import Trainer

TRIAL_STEPS = 2
"""Denoising steps of the trial's image: enough to call every network, too few to cost much."""


def try_all(trainer: Trainer, terms: Sequence[Term]) -> None:
    """Generate one image at the run's settings, with at most two denoising steps, and score it with every reward.

    What would fail in the first step or in the evaluation after the last one fails in the first seconds: a network that
    does not fit its pipeline, values that are not finite, a reward that raises for the run's prompts, or that was
    written a minute ago and has no gradient.

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
    # Capturing graphs would take longer than two steps.
    backprop = BackpropConfig(cuda_graphs=False)
    sampler = Sampler(family.pipeline, sampling, backprop, family=type(family)(family.pipeline, sampling))
    text = prompts.prompts[0]
    noise = sampler.noise([text], seed=config.training.seed)
    images = sampler.generate([text], noise)
    height, width = images.shape[2:]
    tried = (
        f"This was a trial before training, with one image of {width}x{height} pixels and {steps} denoising steps, for "
        f'the prompt "{text}".'
    )
    keys = {entry.label: f"evaluation.rewards.{i}.name" for i, entry in enumerate(config.evaluation.rewards)}
    keys |= {entry.label: f"rewards.{i}.name" for i, entry in enumerate(config.rewards)}
    # Plugins' own tests check that their rewards do not mix samples.
    mine = {
        entry.label
        for entry in config.rewards
        if entry.loader is not None or trainer.registry.local(entry.name) is not None
    }
    for term in terms:
        trained = term in trainer.mix.terms
        chosen = prompts if trained else trainer.heldout or prompts
        batch = ImageBatch(images=images, prompts=chosen.prompts[:1], metadata=chosen.metadata[:1])
        with _trial(keys.get(term.label), tried):
            if trained and term.differentiable and term.label in mine:
                try_alone(term, batch)
            else:
                _score(term, batch, gradient=trained and term.differentiable)


def try_alone(term: Term, batch: ImageBatch) -> None:
    """Score one image beside an image of noise; the noise must not change the score, as a mean over the batch would.

    Raises:
        RewardError: the reward breaks its contract, or its score or gradient is not finite.
    """
    noise = torch.rand(batch.images.shape, generator=torch.Generator().manual_seed(0)).to(batch.images)
    two = ImageBatch(
        images=torch.cat([batch.images, noise]),
        prompts=[*batch.prompts] * 2,
        metadata=[*batch.metadata] * 2,
    )
    gradient = _score(term, two, gradient=True)
    if gradient is not None and gradient[1].any():
        raise RewardError(
            f'Reward "{term.label}": the score of an image depends on the other images of its batch. '
            "Reduce over pixels, images.mean((1, 2, 3)), never over the batch."
        )


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
