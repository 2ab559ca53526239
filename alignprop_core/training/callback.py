"""The interface of callbacks: what a run calls while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignprop_core.mix.stats import StepStats
    from alignprop_core.training.trainer import Trainer


class Callback:
    """Called while a run trains; override the methods you need. Callbacks run on the main process only."""

    def on_start(self, trainer: Trainer) -> None:
        """Called once, before the first step; the run folder exists."""

    def on_step(self, trainer: Trainer, stats: StepStats) -> None:
        """Called after each optimizer step, with its statistics."""

    def on_evaluation(self, trainer: Trainer, results: Mapping[str, Any]) -> None:
        """Called after each evaluation while training (`evaluation.every`).

        `results` has `scores` (label -> n, mean, std), the mix's `total`, `drift` and `diversity`.
        """

    def on_end(self, trainer: Trainer) -> None:
        """Called once, after the last step."""

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        """Called when the run fails or is interrupted, before the error is raised further."""

    def on_close(self, trainer: Trainer) -> None:
        """Called once, after `on_end` or `on_error` of all callbacks: release what `on_start` opened."""

    def on_results(self, folder: Path) -> None:
        """Called after `alignprop evaluate` has written result files into a folder, a run's or the one of `--output`.

        No run is active then: only automatic callbacks of plugins are called, and only this method.
        """
