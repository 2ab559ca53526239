"""TensorBoard and Weights & Biases, for `training.trackers` in a run config. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from alignprop_core.hookspecs import hookimpl
from alignprop_core.specs import CallbackSpec


@hookimpl
def alignprop_register_callbacks() -> Iterable[CallbackSpec]:
    """Return the trackers."""
    return [
        CallbackSpec(
            name="tensorboard",
            summary="Event files for TensorBoard in the run folder.",
            factory="alignprop_trackers.trackers:TensorBoard",
        ),
        CallbackSpec(
            name="wandb", summary="A Weights & Biases run.", factory="alignprop_trackers.trackers:WeightsAndBiases"
        ),
    ]
