"""Progress of a run in a notebook: a bar, and the newest preview images below it."""

from __future__ import annotations

import sys
from html import escape
from importlib import import_module
from typing import TYPE_CHECKING, Any

from alignprop_core.mix.stats import StepStats
from alignprop_core.training.progress import ProgressBar, term_values
from alignprop_core.training.result import inline_image

if TYPE_CHECKING:
    from alignprop_core.training.trainer import Trainer


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython: Any = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


class NotebookProgress(ProgressBar):
    """A bar as HTML, updated in place, and the newest preview."""

    def on_start(self, trainer: Trainer) -> None:
        """Show the bar and the preview before the first step."""
        self._shown = ""
        display = import_module("IPython.display").display
        self._outputs = [display(_html(""), display_id=True) for _ in range(2)]
        if trainer.costs is not None:
            self._print(f"memory: {trainer.costs}")
        self._update(trainer, "")

    def on_step(self, trainer: Trainer, stats: StepStats) -> None:
        """Advance the bar; show the newest preview."""
        if stats.skipped:
            self._print(f"step {stats.step} skipped: {stats.skipped}")
        self._update(trainer, "  ".join([f"total {stats.total:.4g}", *term_values(stats)]))

    def on_end(self, trainer: Trainer) -> None:
        """Show the last preview."""
        self._update(trainer, "")

    def _update(self, trainer: Trainer, status: str) -> None:
        done, steps = trainer.step_number, trainer.config.training.steps
        bar = f'<progress value="{done}" max="{max(steps, 1)}"></progress> step {done}/{steps}&emsp;{escape(status)}'
        self._outputs[0].update(_html(bar))
        preview = trainer.folder.path / "images" / f"step-{done:06d}.png"
        if preview.name != self._shown and preview.is_file():
            self._shown = preview.name
            self._outputs[1].update(_html(f"<p>Step {done}</p>{inline_image(preview)}"))


def _html(text: str) -> Any:
    return import_module("IPython.display").HTML(text)
