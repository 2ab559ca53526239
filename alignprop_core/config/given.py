"""Objects passed from Python: how they enter a run config, and what the config of an earlier run says of them."""

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
    """Return which rewards of a run were passed from Python: name -> `class NAME of module MODULE`, or a function.

    Empty if the folder is not a run, or its environment.json cannot be read or is of a version without them.
    """
    known = read_table(folder / "environment.json").get("local_rewards")
    return {
        name: f"{what} {origin[what]} of module {origin['module']}"
        for name, origin in (known.items() if isinstance(known, dict) else ())
        for what in ("class", "function")
        if isinstance(origin, dict) and {what, "module"} <= set(origin)
    }


def was_given(name: str, code: str, folder: Path) -> str:
    """Return why a run's reward from Python cannot be found by its name, and what to do.

    Args:
        name: the reward.
        code: its class or function, as `given_to_run` returns it.
        folder: the run folder.
    """
    what, named, *_ = code.split()
    return (
        f'"{name}" was an object passed from Python ({code}), which a command cannot create. To resume or to train '
        f'again, use Python: alignprop_core.train("{folder / "config.yaml"}", rewards={{"{name}": ...}}), with '
        f'resume=Path("{folder}") to resume. To evaluate, put the {what} into a file and name it in place of "{name}" '
        f"in this config: ./my_rewards.py:{named.rpartition('.')[2]} (the path starts at the config's folder)."
    )
