"""From the run config's reward entries to loaded terms: rewards to train on, and measures to report beside them."""

from __future__ import annotations

from collections.abc import Sequence

from alignprop_core.config import RewardTerm
from alignprop_core.mix import Term
from alignprop_core.registry import Registry


def load_terms(entries: Sequence[RewardTerm], registry: Registry) -> list[Term]:
    """Load the rewards of config entries; the first that cannot load raises with its plugin's own traceback."""
    return [
        Term(
            label=entry.label,
            reward=registry.load_reward(entry.name, entry.options),
            weight=entry.weight,
            ceiling=entry.ceiling,
            differentiable=registry.reward(entry.name).spec.differentiable,
        )
        for entry in entries
    ]


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
