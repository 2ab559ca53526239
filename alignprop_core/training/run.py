"""Training as `alignprop train` does it: the trainer with all its callbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from alignprop_core.config.load import load_config, located
from alignprop_core.config.sections import RunConfig
from alignprop_core.registry.registry import Registry, default_registry
from alignprop_core.reward import Reward
from alignprop_core.training.callback import Callback
from alignprop_core.training.callbacks import (
    Checkpoints,
    Evaluation,
    LoraFiles,
    Previews,
    ProgressBar,
)
from alignprop_core.training.heldout import HeldOut
from alignprop_core.training.measures import Measures
from alignprop_core.training.plugin_callbacks import automatic_callbacks, named_callbacks
from alignprop_core.training.trainer import Trainer


def default_callbacks(trainer: Trainer, console: Console | None = None) -> list[Callback]:
    """Return the callbacks of a run in their order; reports come after the evaluation they show."""
    trackers = named_callbacks(trainer.config.training.trackers, trainer.registry)
    automatic = automatic_callbacks(trainer.registry)
    progress, measures = ProgressBar(console), Measures(trainer)
    heldout = HeldOut(measures, progress.console, progress.bar)
    # Before the files: what is the best, and whether the run goes on, is known when they are written.
    files = [LoraFiles(), Checkpoints()]
    return [Previews(), progress, heldout, *files, *trackers, Evaluation(measures), *automatic]


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
    rewards: Mapping[str, Reward] | None = None,
    resume: Path | None = None,
    edited: bool = False,
) -> Path:
    """Fine-tune on a run config, as `alignprop train` does; returns the run folder.

    Args:
        config: a run config, or the path of one.
        overrides: `key.path=value` changes to a config file.
        callbacks: watchers of your own; they run after the built-in ones.
        registry: installed plugins; discovered if None.
        rewards: reward objects by name, such as `{"redness": Redness(...)}`. The config's `rewards` may name them to
            give weight, ceiling and label; one it does not mention is trained on with weight 1.
        resume: a run folder or checkpoint to go on from.
        edited: go on although the code of a reward was changed since, as after mending it.
    """
    registry = (registry or default_registry()).with_rewards(rewards or {})
    if isinstance(config, RunConfig):
        return run(Trainer(config, registry=registry, callbacks=callbacks, resume=resume, edited=edited))
    settings = load_config(config, overrides, registry=registry)
    with located(config, overrides):
        return run(Trainer(settings, registry=registry, callbacks=callbacks, resume=resume, edited=edited))
