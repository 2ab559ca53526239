"""Evaluation while training with early stopping, and `alignprop evaluate`. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from alignprop_core.hookspecs import hookimpl
from alignprop_core.specs import CallbackSpec, CommandSpec


@hookimpl
def alignprop_register_callbacks() -> Iterable[CallbackSpec]:
    """Return the callback of runs with `evaluation.every`."""
    return [
        CallbackSpec(
            name="early_stopping",
            summary="Evaluations while training (evaluation.every), and early stopping.",
            factory="alignprop_evaluation.while_training:HeldOutEvaluation",
            license="Apache-2.0",
        )
    ]


@hookimpl
def alignprop_register_commands() -> Iterable[CommandSpec]:
    """Return the command `alignprop evaluate`."""
    return [
        CommandSpec(
            path="evaluate",
            summary="Evaluate a run, or a model with a LoRA, on held-out prompts; optionally at several strengths.",
            factory="alignprop_evaluation.command:evaluate",
            license="Apache-2.0",
        )
    ]
