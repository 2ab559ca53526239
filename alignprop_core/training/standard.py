"""The standard callbacks of a run, which write its folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alignprop_core.training.callback import Callback
from alignprop_core.training.notebook import NotebookProgress, in_notebook
from alignprop_core.training.outputs import Checkpoints, FinalEvaluation, LoraFiles, Previews
from alignprop_core.training.plugin_callbacks import EARLY_STOPPING, automatic_callbacks, named_callbacks
from alignprop_core.training.progress import ProgressBar
from alignprop_core.training.shares import Shares

if TYPE_CHECKING:
    from alignprop_core.training.trainer import Trainer


def standard_callbacks(trainer: Trainer) -> list[Callback]:
    """Return the standard callbacks of a run in the order they are called.

    Trackers are open before the first evaluation. Early stopping comes before the files, because it decides what is
    the best LoRA and whether the run continues; the final evaluation comes after them, and automatic callbacks of
    plugins, such as the report, last.
    """
    config, evaluator = trainer.config, trainer.evaluator
    progress = NotebookProgress(trainer.console) if in_notebook() else ProgressBar(trainer.console)
    names = [*config.training.trackers, *([EARLY_STOPPING] if config.evaluation.every is not None else [])]
    callbacks: list[Callback] = [Previews(), progress, *named_callbacks(names, trainer.registry)]
    callbacks += [LoraFiles(), Checkpoints(), *([Shares()] if len(config.rewards) > 1 else [])]
    if evaluator is not None and config.evaluation.at_end:
        callbacks.append(FinalEvaluation(evaluator))
    return [*callbacks, *automatic_callbacks(trainer.registry)]
