"""Writes report.html at the end of every run, and brings it up to date after an evaluation. Imports no torch."""

from __future__ import annotations

import shlex
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from alignprop_core.training.callback import Callback
from alignprop_report.run_files import read_run
from alignprop_report.run_page import run_page, write_page
from alignprop_report.sweep_plot import write_plots

if TYPE_CHECKING:
    from alignprop_core.training.trainer import Trainer


class Report(Callback):
    """report.html at the end of a run, even if it failed after its first step; an error here never fails the run."""

    def on_end(self, trainer: Trainer) -> None:
        """Write the page."""
        self.write(trainer.folder.path)

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        """Write the page for the finished steps."""
        if trainer.step_number:
            self.write(trainer.folder.path)

    def on_results(self, folder: Path) -> None:
        """Plot new curves, and update a run's page where there is one."""
        write_plots(folder)
        if (folder / "report.html").is_file() and (folder / "config.yaml").is_file():
            self.write(folder)

    def write(self, folder: Path) -> None:
        """Write the page, or warn why there is none."""
        try:
            write_page(folder / "report.html", run_page(read_run(folder)))
        except Exception as error:
            again = shlex.join(["alignprop", "report", str(folder)])
            warnings.warn(
                f"report.html is not written: {type(error).__name__}: {error}. The run's other files are complete; "
                f"`{again}` tries again.",
                stacklevel=2,
            )
