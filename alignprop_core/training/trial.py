"""A trial of the rewards before training: rewards that cannot score or give no gradient fail before the model loads."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

import torch

from alignprop_core.config.rewards import RewardTerm
from alignprop_core.diffusion.size import UNKNOWN_SIZE
from alignprop_core.errors import ConfigError, RewardError, TrialError, UserError
from alignprop_core.mix.term import Term
from alignprop_core.prompts import PromptSet
from alignprop_core.registry.registry import Registry
from alignprop_core.reward import ImageBatch


def score_advice(entry: RewardTerm, registry: Registry) -> str:
    """Return how to try a term's reward on an image, as the end of a sentence; empty if no command can.

    Args:
        entry: the term; commands know its name, not its label.
        registry: knows which names are objects from Python, which no command can find.
    """
    if entry.loader is not None or entry.name in registry.given:
        return ""
    try:
        usual = registry.reward_options(entry.name).model_dump(mode="json")
    except ConfigError:  # an option has no default
        usual = {}
    words = ["--reward", entry.name]
    for key, value in entry.options.items():
        if key not in usual or usual[key] != value:
            words += ["-o", f"{key}={json.dumps(value, ensure_ascii=False)}"]
    return f"with `alignprop score IMAGE {shlex.join(words)}`"


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
        TrialError: naming the term and its key, if it raises, breaks its contract or gives no gradient.
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
        batch = ImageBatch(images=images.clone().requires_grad_(), **texts)
        try:
            with torch.enable_grad():
                scores = term.score(batch)
            if term.differentiable:
                with term.placed, term.named("raised in its backward pass"):
                    (gradient,) = torch.autograd.grad(scores[0], batch.images)
                if gradient[1].any():
                    raise RewardError(
                        f'Reward "{term.label}": the score of an image depends on the other images of its batch. '
                        "Reduce over pixels, images.mean((1, 2, 3)), never over the batch."
                    )
        except (UserError, RewardError) as error:
            failed = TrialError(f"{str(error).rstrip('.')}. {tried}")
            failed.key = f"{where}.{i}.name"
            for note in getattr(error, "__notes__", ()):
                failed.add_note(note)
            raise failed from error
