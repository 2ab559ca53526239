"""The command `alignprop rewards new`: create a reward plugin from a template. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from alignprop_core.hookspecs import hookimpl
from alignprop_core.specs import CommandSpec


@hookimpl
def alignprop_register_commands() -> Iterable[CommandSpec]:
    """Return the command `alignprop rewards new`."""
    return [
        CommandSpec(
            path="rewards new",
            summary="Create a plugin with one reward that can be installed, passes its tests and can be trained on.",
            factory="alignprop_template.command:new",
            license="Apache-2.0",
        )
    ]
