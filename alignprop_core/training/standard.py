"""The standard callbacks of a run, which write its folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from alignprop_core.training.callback import Callback
from alignprop_core.training.heldout import FinalEvaluation, HeldOutEvaluation
from alignprop_core.training.notebook import NotebookProgress, in_notebook
from alignprop_core.training.outputs import Checkpoints, LoraFiles, Previews
from alignprop_core.training.plugin_callbacks import automatic_callbacks, named_callbacks
from alignprop_core.training.progress import ProgressBar
from alignprop_core.training.shares import Shares

if TYPE_CHECKING:
    from alignprop_core.training.trainer import Trainer


def standard_callbacks(trainer: Trainer, console: Console | None = None) -> list[Callback]:
    """Return the standard callbacks of a run in the order they are called.

    Trackers are open before the first evaluation. Evaluation comes before the files, because it decides what is the
    best LoRA and whether the run continues; the final evaluation comes after them, and automatic callbacks of plugins,
    such as the report, last.
    """
    config, evaluator = trainer.config, trainer.evaluator
    progress = NotebookProgress(console) if in_notebook() else ProgressBar(console)
    callbacks: list[Callback] = [Previews(), progress, *named_callbacks(config.training.trackers, trainer.registry)]
    if evaluator is not None and config.evaluation.every is not None:
        callbacks.append(HeldOutEvaluation(evaluator, progress.console, progress.bar))
    callbacks += [LoraFiles(), Checkpoints(), *([Shares()] if len(config.rewards) > 1 else [])]
    if evaluator is not None and config.evaluation.at_end:
        callbacks.append(FinalEvaluation(evaluator))
    return [*callbacks, *automatic_callbacks(trainer.registry)]
