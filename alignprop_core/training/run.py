"""Training as `alignprop train` does it: the trainer with all its callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from alignprop_core.config import RunConfig, load_config
from alignprop_core.registry import Registry, default_registry
from alignprop_core.training.callback import Callback
from alignprop_core.training.callbacks import Checkpoints, Evaluation, LoraFiles, Previews, ProgressBar, Trackers
from alignprop_core.training.trainer import Trainer


def default_callbacks(trainer: Trainer, console: Console | None = None) -> list[Callback]:
    """Return the callbacks of a run in their order; evaluation comes last."""
    names = list(trainer.config.training.trackers)
    trackers = [Trackers(names)] if names else []
    return [Previews(), ProgressBar(console), LoraFiles(), Checkpoints(), *trackers, Evaluation()]


def run(trainer: Trainer, console: Console | None = None) -> Path:
    """Train with the default callbacks in front of the trainer's own; returns the run folder."""
    trainer.callbacks = [*default_callbacks(trainer, console), *trainer.callbacks]
    return trainer.train()


def train(
    config: RunConfig | str | Path,
    overrides: Sequence[str] = (),
    *,
    callbacks: Sequence[Callback] = (),
    registry: Registry | None = None,
    resume: Path | None = None,
) -> Path:
    """Fine-tune on a run config, as `alignprop train` does; returns the run folder.

    Args:
        config: a run config, or the path of one.
        overrides: `key.path=value` changes to a config file.
        callbacks: watchers of your own; they run after the built-in ones.
        registry: installed plugins; discovered if None.
        resume: a run folder or checkpoint to go on from.
    """
    registry = registry or default_registry()
    if not isinstance(config, RunConfig):
        config = load_config(config, overrides, registry=registry)
    return run(Trainer(config, registry=registry, callbacks=callbacks, resume=resume))
