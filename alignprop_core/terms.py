"""From the run config's reward entries to loaded terms: rewards to train on, and measures to report beside them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from alignprop_core.config import RewardTerm, RunConfig
from alignprop_core.errors import PromptError, RewardError, UserError, under
from alignprop_core.measured import measure_entries as measure_entries
from alignprop_core.mix import Term
from alignprop_core.prompts import PromptSet, listed
from alignprop_core.registry import Registry
from alignprop_core.reward import ImageBatch, Reward


def load_terms(entries: Sequence[RewardTerm], registry: Registry, *, where: str = "") -> list[Term]:
    """Load the rewards of config entries; the first that cannot load raises with its plugin's own traceback.

    Args:
        entries: the rewards.
        registry: where they are looked up.
        where: key of the entries in the run config, for messages; empty if they stand in none.
    """
    return [
        Term(
            label=entry.label,
            reward=_load(entry, registry, f"{where}.{i}" if where else ""),
            weight=entry.weight,
            ceiling=entry.ceiling,
            floor=entry.floor,
            target=entry.target,
            differentiable=registry.of(entry.isolation).reward(entry.name).spec.differentiable,
        )
        for i, entry in enumerate(entries)
    ]


def _load(entry: RewardTerm, registry: Registry, key: str) -> Reward:
    try:
        with under(key) if key else nullcontext():
            return registry.of(entry.isolation).load_reward(entry.name, entry.options)
    except RewardError as error:
        if entry.isolation is None:
            raise
        named = RewardError(f'Reward "{entry.label}": {error}')
        for note in getattr(error, "__notes__", ()):
            named.add_note(note)
        raise named from error


def check_prompts(terms: Sequence[Term], prompts: PromptSet) -> None:
    """Let every reward look at the prompts it will be given, so that it is not a step that finds the wrong one.

    Raises:
        PromptError: naming the prompts a reward cannot use, each with its line, and the reward.
        RewardError: a reward failed to look.
    """
    problems = []
    for term in terms:
        for i, (prompt, metadata) in enumerate(zip(prompts.prompts, prompts.metadata, strict=True)):
            try:
                with term.named("could not look at a prompt:"):
                    term.reward.check_prompt(prompt, metadata)
            except UserError as error:
                problems.append(prompts.problem(i, error))
    if problems:
        raise PromptError(listed(problems))


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
    """Score one picture of noise with rewards from Python, a file or another environment: do they give a gradient?

    A plugin's spec declares that and its tests hold it to it; a class written a minute ago may well not have one, and
    an environment may lack something that scoring needs. To find out at the first step would cost the loading of a
    model.

    Raises:
        RewardError: naming the term, if it raises, breaks its contract or gives no gradient.
    """
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    first: dict[str, Any] = {"prompts": prompts.prompts[:1], "metadata": prompts.metadata[:1]}
    for term, entry in zip(terms, entries, strict=True):
        if entry.isolation is not None or registry.local(entry.name) is not None:
            batch = ImageBatch(images=images.clone().requires_grad_(), **first)
            with torch.enable_grad():
                term.score(batch)
