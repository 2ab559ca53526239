"""The commands `alignprop lora`: inspect, convert, scale, merge and fuse LoRA files. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from alignprop_core.hookspecs import hookimpl
from alignprop_core.specs import CommandSpec

_GROUP = "Inspect, convert, scale, merge and fuse LoRA files."


@hookimpl
def alignprop_register_commands() -> Iterable[CommandSpec]:
    """Return the commands of `alignprop lora`."""
    return [
        CommandSpec(
            path="lora info",
            summary="Show a LoRA's rank, alpha, base model, layers and header metadata.",
            group_summary=_GROUP,
            factory="alignprop_lora.commands:info",
            license="Apache-2.0",
        ),
        CommandSpec(
            path="lora convert",
            summary="Convert a LoRA between diffusers' and kohya's formats.",
            group_summary=_GROUP,
            factory="alignprop_lora.commands:convert",
            license="Apache-2.0",
        ),
        CommandSpec(
            path="lora scale",
            summary="Multiply a LoRA's weight change by a factor: the result at strength 1 is the original at that "
            "strength.",
            group_summary=_GROUP,
            factory="alignprop_lora.commands:scaling",
            license="Apache-2.0",
        ),
        CommandSpec(
            path="lora merge",
            summary="Merge LoRAs: the weighted sum of their weight changes, not an average of their factors.",
            group_summary=_GROUP,
            factory="alignprop_lora.commands:merge",
            license="Apache-2.0",
        ),
        CommandSpec(
            path="lora fuse",
            summary="Fuse a LoRA into a model's weights and write the complete model, for programs without LoRA "
            "support.",
            group_summary=_GROUP,
            factory="alignprop_lora.commands:fuse",
            license="Apache-2.0",
        ),
    ]
