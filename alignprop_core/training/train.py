"""Training from Python, as `alignprop train` does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from alignprop_core.config.load import load_config, located
from alignprop_core.config.sections import RunConfig
from alignprop_core.registry.registry import Registry, default_registry
from alignprop_core.reward import Reward
from alignprop_core.training.callback import Callback
from alignprop_core.training.trainer import Trainer


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
        callbacks: called after the standard callbacks.
        registry: installed plugins; discovered if None.
        rewards: reward objects by name, such as `{"redness": Redness(...)}`. The config's `rewards` may name them to
            give weight, ceiling and label; one it does not mention is trained on with weight 1.
        resume: a run folder or checkpoint to resume from.
        edited: resume even if a reward's code has changed, for example after a bug fix.
    """
    registry = (registry or default_registry()).with_rewards(rewards or {})
    if isinstance(config, RunConfig):
        return Trainer(config, registry=registry, callbacks=callbacks, resume=resume, edited=edited).train()
    settings = load_config(config, overrides, registry=registry)
    with located(config, overrides):
        return Trainer(settings, registry=registry, callbacks=callbacks, resume=resume, edited=edited).train()
