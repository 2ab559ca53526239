"""Callbacks that log to accelerate's trackers: one record per step and per evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from alignprop_core import Callback
from alignprop_core.errors import ConfigError

if TYPE_CHECKING:
    from alignprop_core import StepStats, Trainer


class Tracker(Callback, ABC):
    """Logs each step and each evaluation to one of accelerate's trackers.

    Raises:
        ConfigError: the package it writes with is not installed.
    """

    package: ClassVar[str]
    """The package, which is also the extra of this distribution that installs it."""

    def __init__(self) -> None:
        if find_spec(self.package) is None:
            raise ConfigError(
                f"training.trackers: {self.package} is not installed. Install it: "
                f'pip install "alignprop-trackers[{self.package}]".'
            )

    @abstractmethod
    def open(self, folder: Path) -> Any:
        """Return accelerate's tracker; it writes its files to the run folder."""

    def on_start(self, trainer: Trainer) -> None:
        """Open the tracker."""
        self.tracker = self.open(trainer.folder.path)
        # Newer versions of accelerate separate building a tracker from starting it.
        if callable(start := getattr(self.tracker, "start", None)):
            start()

    def on_step(self, trainer: Trainer, stats: StepStats) -> None:
        """Log one step."""
        values = stats.as_json()
        for label, term in stats.terms.items():
            values |= {f"{label}/{kind}": value for kind, value in term.items()}
        values |= {f"cosine/{pair}": value for pair, value in stats.cosines.items()}
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float)) and key != "step"}
        self.tracker.log(numbers, step=stats.step)

    def on_evaluation(self, trainer: Trainer, results: Mapping[str, Any]) -> None:
        """Log an evaluation's means."""
        values = {f"heldout/{label}": score["mean"] for label, score in results["scores"].items()}
        values |= {f"heldout/{key}": results[key] for key in ("total", "drift", "diversity")}
        self.tracker.log({key: value for key, value in values.items() if value is not None}, step=trainer.step_number)

    def on_end(self, trainer: Trainer) -> None:
        """Close the tracker."""
        self.tracker.finish()


class TensorBoard(Tracker):
    """Event files in the run folder."""

    package = "tensorboard"

    def open(self, folder: Path) -> Any:
        """Return accelerate's TensorBoard tracker."""
        from accelerate.tracking import TensorBoardTracker

        return TensorBoardTracker("tensorboard", logging_dir=str(folder))


class WeightsAndBiases(Tracker):
    """A Weights & Biases run named after the run folder."""

    package = "wandb"

    def open(self, folder: Path) -> Any:
        """Return accelerate's Weights & Biases tracker."""
        from accelerate.tracking import WandBTracker

        return WandBTracker(folder.name, dir=str(folder))
