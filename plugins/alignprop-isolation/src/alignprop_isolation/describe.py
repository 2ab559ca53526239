"""Runs in a reward's own environment: describes the reward and checks its options there. No torch.

    python -I -m alignprop_isolation.describe < request.json

The request is {"name": ..., "options": {...} or null}. The answer, on standard output, has the spec, the JSON schema of
the options and the options with their defaults (null if the request had none and one is required), or an error.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from typing import Any

from alignprop_core import __version__
from alignprop_core.errors import ConfigError
from alignprop_core.registry.registry import Registry, default_registry
from alignprop_isolation.messages import PROTOCOL, error_data


def describe(name: str, options: dict[str, Any] | None) -> dict[str, Any]:
    """Return distribution, version, spec and options schema of a reward, and the checked options."""
    registry = default_registry()
    offer = registry.reward(name)
    kind = registry.reward_config_class(name)
    local = registry.local(name)
    return {
        "distribution": offer.distribution,
        "version": offer.version,
        "spec": offer.spec.model_dump(mode="json"),
        "schema": kind.model_json_schema(),
        "options": _checked(registry, name, options),
        "origin": None if local is None else local.origin,
    }


def _checked(registry: Registry, name: str, options: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the options with their defaults; with None, the defaults alone, or None if an option is required."""
    try:
        return registry.reward_options(name, options).model_dump(mode="json")
    except ConfigError:
        if options is None:
            return None
        raise


def main() -> None:
    """Answer the request on standard input."""
    request = json.load(sys.stdin)
    # Standard output is for the answer alone: what a plugin prints at import, from C too, goes to standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    answer: dict[str, Any] = {"protocol": PROTOCOL, "core": __version__, "python": platform.python_version()}
    try:
        answer |= describe(request["name"], request["options"])
    except Exception as error:
        answer["error"] = error_data(error)
    json.dump(answer, answers)
    answers.flush()


if __name__ == "__main__":
    main()
