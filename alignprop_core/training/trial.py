"""A trial of the rewards before training: one that cannot score or gives no gradient fails before the model loads."""

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
    """Return how a term's reward is tried on a picture, as the end of a sentence; empty where no command can.

    Args:
        entry: the term; its label is nothing a command knows.
        registry: which of the names are objects from Python, that no command can find.
    """
    if entry.loader is not None or entry.name in registry.given:
        return ""
    try:
        usual = registry.reward_options(entry.name).model_dump(mode="json")
    except ConfigError:  # one has no default
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
    """Score one picture of noise with rewards from Python, a file or another environment: do they give a gradient?

    A plugin's spec declares that and its tests hold it to it; a class written a minute ago may well not have one, and
    an environment may lack something that scoring needs. To find out at the first step would cost the loading of a
    model. The picture has the size, dtype and range of the run's.

    Args:
        terms: the loaded rewards.
        entries: what the config says of them, in the same order.
        registry: where they were looked up.
        prompts: the run's; the first one is used.
        device: where the rewards are.
        size: (height, width) in pixels, as `image_size` tells; None is `UNKNOWN_SIZE`.
        where: key of the entries in the run config.

    Raises:
        TrialError: naming the term and its key, if it raises, breaks its contract or gives no gradient.
    """
    height, width = size or UNKNOWN_SIZE
    # As the sampler decodes: float32 (a float64 model, which no config asks for, would give float64) in [0, 1].
    images = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)
    first: dict[str, Any] = {"prompts": prompts.prompts[:1], "metadata": prompts.metadata[:1]}
    whose = "the size the run draws" if size else "as the model's own size is not known before it loads"
    tried = f"This was a trial before training, with 1 random image of {width}x{height} pixels ({whose})."
    for i, (term, entry) in enumerate(zip(terms, entries, strict=True)):
        if entry.loader is None and registry.local(entry.name) is None:
            continue
        batch = ImageBatch(images=images.clone().requires_grad_(), **first)
        try:
            with torch.enable_grad():
                term.score(batch)
        except (UserError, RewardError) as error:
            failed = TrialError(f"{str(error).rstrip('.')}. {tried}")
            failed.key = f"{where}.{i}.name"
            for note in getattr(error, "__notes__", ()):
                failed.add_note(note)
            raise failed from error
