"""Rewards passed from Python: how they enter a run config, and what became of them in the config of an old run."""

from __future__ import annotations

from pathlib import Path

from alignprop_core._files import read_table
from alignprop_core.config.rewards import RewardTerm
from alignprop_core.config.sections import RunConfig
from alignprop_core.errors import ConfigError, under
from alignprop_core.registry.registry import Registry


def with_given(config: RunConfig, registry: Registry) -> RunConfig:
    """Return the config with a term of weight 1 for every reward object of the registry that it does not mention.

    Raises:
        ConfigError: then, too, there is nothing to train on.
    """
    named = {entry.name for entry in (*config.rewards, *config.evaluation.rewards)}
    added = [
        RewardTerm.model_validate({"name": name, "options": registry.reward_options(name).model_dump(mode="json")})
        for name in registry.given
        if name not in named
    ]
    if not (config.rewards or added):
        with under("rewards"):
            raise ConfigError("there is nothing to train on; name a reward, or pass an object from Python (rewards=).")
    # Validated anew: a label may be taken.
    return RunConfig.model_validate({**dict(config), "rewards": [*config.rewards, *added]}) if added else config


def given_to_run(folder: Path) -> dict[str, str]:
    """Return which rewards of a run were objects passed from Python: name -> `Class of module`, by environment.json.

    Empty where the folder holds no run, or its environment.json cannot be read or is of a version that does not say.
    """
    told = read_table(folder / "environment.json").get("local_rewards")
    return {
        name: f"{origin['class']} of module {origin['module']}"
        for name, origin in (told.items() if isinstance(told, dict) else ())
        if isinstance(origin, dict) and {"class", "module"} <= set(origin)
    }


def was_given(name: str, kind: str, folder: Path) -> str:
    """Say why a run's reward from Python cannot be found by its name, and what to do.

    Args:
        name: the reward.
        kind: its class, as `given_to_run` tells.
        folder: the run folder.
    """
    named = kind.partition(" ")[0].rpartition(".")[2]
    return (
        f'"{name}" was an object passed from Python (class {kind}); a command cannot make it again. To go on or to '
        f'train anew, do it from Python: alignprop_core.train("{folder / "config.yaml"}", rewards={{"{name}": ...}}), '
        f'with resume=Path("{folder}") to go on. To evaluate, put the class into a file and name it in place of '
        f'"{name}" in this config: ./my_rewards.py:{named} (the path starts at the config\'s folder).'
    )
