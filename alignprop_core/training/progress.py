"""Progress of a run in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console

from alignprop_core.evaluation.progress import progress_bar
from alignprop_core.mix.stats import StepStats
from alignprop_core.training.callback import Callback

if TYPE_CHECKING:
    from alignprop_core.training.trainer import Trainer


class ProgressBar(Callback):
    """A bar with the total and the time left; in a pipe, one line per step instead."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.bar = progress_bar(self.console)

    def on_start(self, trainer: Trainer) -> None:
        """Show the bar."""
        steps, done = trainer.config.training.steps, trainer.step_number
        if trainer.costs is not None:
            self._print(f"memory: {trainer.costs}")
        self.task = self.bar.add_task("training", total=steps, completed=done, status="")
        self.bar.start()

    def on_step(self, trainer: Trainer, stats: StepStats) -> None:
        """Advance the bar."""
        if stats.skipped:
            self._print(f"step {stats.step} skipped: {stats.skipped}")
        values = [f"total {stats.total:.4g}", *term_values(stats)]
        if self.console.is_terminal:
            self.bar.update(self.task, completed=stats.step, status="\n".join(f"  {value}" for value in values))
        else:
            line = "  ".join(values)
            self._print(f"step {stats.step}/{trainer.config.training.steps}  {line}  {stats.seconds:.1f} s")

    def on_evaluation(self, trainer: Trainer, results: Mapping[str, Any]) -> None:
        """Print one line."""
        scores = "  ".join(f"{label} {score['mean']:.4g}" for label, score in results["scores"].items())
        further = [f"drift {results['drift']:.3g}"]
        further += [] if results["diversity"] is None else [f"diversity {results['diversity']:.3g}"]
        self._print(f"held-out at step {trainer.step_number}  {scores}  {'  '.join(further)}")

    def on_end(self, trainer: Trainer) -> None:
        """Remove the bar."""
        self.bar.stop()

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        """Remove the bar, so that the message is below it."""
        self.bar.stop()

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)


def term_values(stats: StepStats) -> list[str]:
    """Return a step's terms, each as text: raw scores, and for several terms their shares and the worst conflict.

    `clip_score 0.27 61%`, `jpeg -5.3 39%`, `cos -0.12`: raw scores, shares of the gradient, lowest cosine of two
    gradients.
    """
    parts = []
    for label, values in stats.terms.items():
        share = values["share"] if len(stats.terms) > 1 else None
        parts.append(f"{label} {values['raw']:.4g}" + ("" if share is None else f" {round(100 * share)}%"))
    known = [value for value in stats.cosines.values() if value is not None]
    if known:
        parts.append(f"cos {min(known):.2f}")
    if stats.idle:
        parts.append(f"no update: {stats.idle}")
    return parts
