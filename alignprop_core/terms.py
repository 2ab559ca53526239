"""From the run config's reward entries to loaded terms: rewards to train on, and measures to report beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from alignprop_core.config import RewardTerm, RunConfig
from alignprop_core.mix import Term
from alignprop_core.prompts import PromptSet
from alignprop_core.registry import Registry
from alignprop_core.reward import ImageBatch


def load_terms(entries: Sequence[RewardTerm], registry: Registry) -> list[Term]:
    """Load the rewards of config entries; the first that cannot load raises with its plugin's own traceback."""
    return [
        Term(
            label=entry.label,
            reward=registry.load_reward(entry.name, entry.options),
            weight=entry.weight,
            ceiling=entry.ceiling,
            floor=entry.floor,
            target=entry.target,
            differentiable=registry.reward(entry.name).spec.differentiable,
        )
        for entry in entries
    ]


def with_given(config: RunConfig, registry: Registry) -> RunConfig:
    """Return the config with a term of weight 1 for every reward object of the registry that it does not mention."""
    named = {entry.name for entry in (*config.rewards, *config.evaluation.rewards)}
    added = [
        RewardTerm(name=name, options=registry.reward_options(name).model_dump(mode="json"))
        for name in registry.given
        if name not in named
    ]
    # Validated anew: a label may be taken.
    return RunConfig.model_validate({**dict(config), "rewards": [*config.rewards, *added]}) if added else config


def try_local(
    terms: Sequence[Term],
    entries: Sequence[RewardTerm],
    registry: Registry,
    *,
    prompts: PromptSet,
    device: torch.device,
) -> None:
    """Score one picture of noise with the rewards that come from Python or a file, to see that they have a gradient.

    A plugin's spec declares that and its tests hold it to it; a class written a minute ago may well not have one, and
    to find out at the first step would cost the loading of a model.

    Raises:
        RewardError: naming the term, if it raises, breaks its contract or gives no gradient.
    """
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    first: dict[str, Any] = {"prompts": prompts.prompts[:1], "metadata": prompts.metadata[:1]}
    for term, entry in zip(terms, entries, strict=True):
        if registry.local(entry.name) is not None:
            batch = ImageBatch(images=images.clone().requires_grad_(), **first)
            with torch.enable_grad():
                term.score(batch)


def measure_entries(entries: Sequence[RewardTerm], registry: Registry) -> list[RewardTerm]:
    """Return entries for the true measures that the given rewards name in `evaluate_with`.

    A measure takes over the options it shares with its reward by name (a JPEG quality, say). A measure that is listed
    already, under any label, is not added again with the same options.
    """
    added: list[RewardTerm] = []
    for entry in entries:
        for name in registry.reward(entry.name).spec.evaluate_with:
            known = registry.reward_config_class(name).model_fields
            options = {key: value for key, value in entry.options.items() if key in known}
            if any(other.name == name and other.options == options for other in (*entries, *added)):
                continue
            taken = {other.label for other in (*entries, *added)}
            label = name if name not in taken else f"{name}.{entry.label}"
            added.append(RewardTerm(name=name, label=label, options=options))
    return added
