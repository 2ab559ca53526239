"""Callbacks that log to accelerate's trackers: config, metrics, evaluations and preview images."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from alignprop_core import Callback
from alignprop_core.config.yaml import dump_yaml
from alignprop_core.errors import ConfigError, RunError, complaint
from alignprop_core.evaluation.table import EvaluationTable
from alignprop_core.images import read_image

if TYPE_CHECKING:
    from alignprop_core import StepStats, Trainer


PROJECT = "alignprop"
"""The project of all runs on Weights & Biases, unless WANDB_PROJECT names another."""


class Tracker(Callback, ABC):
    """Logs a run to one of accelerate's trackers.

    Raises:
        ConfigError: the package it writes with is not installed.
    """

    package: ClassVar[str]
    """The package, which is also the extra of this distribution that installs it."""
    remedy: ClassVar[str] = ""
    """What to do if the tracker cannot start."""

    def __init__(self) -> None:
        if find_spec(self.package) is None:
            raise ConfigError(
                f"training.trackers: {self.package} is not installed. Install it: "
                f'pip install "alignprop-trackers[{self.package}]".'
            )
        self.tracker: Any = None
        self.previewed: int | None = None

    @abstractmethod
    def open(self, folder: Path, config: Mapping[str, Any]) -> Any:
        """Return accelerate's tracker, started, for a run folder and its config; it writes its files to the folder."""

    @abstractmethod
    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int) -> None:
        """Log a table."""

    @abstractmethod
    def image(self, name: str, path: Path, step: int) -> None:
        """Log an image file."""

    def on_start(self, trainer: Trainer) -> None:
        """Open the tracker, and log the preview before the first step."""
        try:
            tracker = self.open(trainer.folder.path, trainer.config.model_dump(mode="json"))
        except Exception as error:
            message = f"training.trackers: {self.package} cannot start: {complaint(error)}.{self.remedy}"
            raise RunError(message) from error
        self.tracker = tracker
        self.preview(trainer)

    def on_step(self, trainer: Trainer, stats: StepStats) -> None:
        """Log one step."""
        values = stats.as_json()
        for label, term in stats.terms.items():
            values |= {f"{label}/{kind}": value for kind, value in term.items()}
        values |= {f"cosine/{pair}": value for pair, value in stats.cosines.items()}
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float)) and key != "step"}
        self.tracker.log(numbers, step=stats.step)
        self.preview(trainer)

    def on_evaluation(self, trainer: Trainer, results: Mapping[str, Any]) -> None:
        """Log an evaluation's means."""
        values = {f"heldout/{label}": score["mean"] for label, score in results["scores"].items()}
        values |= {f"heldout/{key}": results[key] for key in ("total", "drift", "diversity")}
        self.tracker.log({key: value for key, value in values.items() if value is not None}, step=trainer.step_number)

    def on_end(self, trainer: Trainer) -> None:
        """Log the last preview."""
        self.preview(trainer)

    def on_close(self, trainer: Trainer) -> None:
        """Log the final evaluation and close the tracker."""
        if self.tracker is None:
            return
        if trainer.comparison is not None:
            table = EvaluationTable(trainer.comparison.as_json())
            self.table("evaluation", table.columns, table.rows, trainer.step_number)
            self.image("before_after", trainer.folder.path / "images" / "before_after.png", trainer.step_number)
        self.tracker.finish()
        self.tracker = None

    def preview(self, trainer: Trainer) -> None:
        """Log the preview of this step, if there is one that was not logged."""
        step = trainer.step_number
        path = trainer.folder.path / "images" / f"step-{step:06d}.png"
        if step != self.previewed and path.is_file():
            self.image("previews", path, step)
            self.previewed = step


def started(tracker: Any) -> Any:
    """Start a tracker; newer versions of accelerate separate building one from starting it."""
    if callable(start := getattr(tracker, "start", None)):
        start()
    return tracker


class TensorBoard(Tracker):
    """Event files in the run folder."""

    package = "tensorboard"

    def open(self, folder: Path, config: Mapping[str, Any]) -> Any:
        """Return accelerate's TensorBoard tracker, with the config as a text."""
        from accelerate.tracking import TensorBoardTracker

        tracker = started(TensorBoardTracker("tensorboard", logging_dir=str(folder)))
        tracker.writer.add_text("config", "\n".join(f"    {line}" for line in dump_yaml(config).splitlines()), 0)
        return tracker

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int) -> None:
        """Log a table as text in Markdown."""
        lines = [columns, ["---"] * len(columns), *rows]
        self.tracker.writer.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines), step)

    def image(self, name: str, path: Path, step: int) -> None:
        """Log an image file."""
        self.tracker.writer.add_image(name, read_image(path), step, dataformats="HWC")


class WeightsAndBiases(Tracker):
    """A Weights & Biases run named after the run folder, in one project for all runs."""

    package = "wandb"
    remedy = " Log in with `wandb login`, or set WANDB_MODE=offline."

    def open(self, folder: Path, config: Mapping[str, Any]) -> Any:
        """Return accelerate's Weights & Biases tracker."""
        from accelerate.tracking import WandBTracker

        project = os.environ.get("WANDB_PROJECT") or PROJECT
        return started(WandBTracker(project, name=folder.name, dir=str(folder), config=dict(config)))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int) -> None:
        """Log a table."""
        full = [[*row, *[""] * (len(columns) - len(row))] for row in rows]
        self.tracker.log_table(name, columns=list(columns), data=full, step=step)

    def image(self, name: str, path: Path, step: int) -> None:
        """Log an image file."""
        self.tracker.log_images({name: [read_image(path)]}, step=step)
