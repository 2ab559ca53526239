"""Which command tries a reward of a run config on an image, for messages. Imports no torch."""

from __future__ import annotations

import json
import shlex

from alignprop_core.config.rewards import RewardTerm
from alignprop_core.errors import ConfigError
from alignprop_core.registry.registry import Registry


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
