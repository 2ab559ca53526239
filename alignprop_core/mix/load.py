"""Load the rewards of the run config's entries as terms of a mix."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from alignprop_core.config.rewards import RewardTerm
from alignprop_core.errors import PromptError, RewardError, UserError, under
from alignprop_core.mix.term import Term, labelled
from alignprop_core.prompts import PromptSet, listed
from alignprop_core.registry.registry import Registry
from alignprop_core.reward import Reward
from alignprop_core.weights.checksum import READ


def load_terms(entries: Sequence[RewardTerm], registry: Registry, *, where: str = "") -> list[Term]:
    """Load the rewards of config entries.

    Args:
        entries: the rewards.
        registry: where they are looked up.
        where: key of the entries in the run config, for messages; empty if they are not from a run config.

    Raises:
        RewardError: a reward cannot be loaded; the plugin's own exception is its cause.
    """
    terms = []
    for i, entry in enumerate(entries):
        before = len(READ)
        terms.append(
            Term(
                label=entry.label,
                reward=_load(entry, registry, f"{where}.{i}" if where else ""),
                weight=entry.weight,
                ceiling=entry.ceiling,
                floor=entry.floor,
                target=entry.target,
                differentiable=registry.source(entry.loader).reward(entry.name).spec.differentiable,
                files=frozenset(READ[before:]),
            )
        )
    return terms


def _load(entry: RewardTerm, registry: Registry, key: str) -> Reward:
    try:
        with under(key) if key else nullcontext():
            return registry.source(entry.loader).load_reward(entry.name, entry.options)
    except RewardError as error:
        if entry.loader is None:
            raise
        raise labelled(error, entry.label) from error


def check_prompts(terms: Sequence[Term], prompts: PromptSet) -> None:
    """Check with every reward that it can use the prompts, before training starts.

    Raises:
        PromptError: names the prompts that a reward cannot use, each with its line, and the reward.
        RewardError: a reward's `check_prompt` failed.
    """
    problems = []
    for term in terms:
        for i, (prompt, metadata) in enumerate(zip(prompts.prompts, prompts.metadata, strict=True)):
            try:
                with term.named("could not check a prompt:"):
                    term.reward.check_prompt(prompt, metadata)
            except UserError as error:
                problems.append(prompts.problem(i, error))
    if problems:
        raise PromptError(listed(problems))
