"""Objects passed from Python: adding them to a run config, and reporting them if a command cannot find them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignprop_core._files import read_table, safe_name, unused_name
from alignprop_core.config.rewards import RewardTerm
from alignprop_core.config.sections import RunConfig
from alignprop_core.errors import ConfigError, PluginError, under
from alignprop_core.registry.local import code_name
from alignprop_core.registry.registry import Registry
from alignprop_core.specs import default_label


def with_given(config: RunConfig, registry: Registry) -> RunConfig:
    """Return the config with a term of weight 1 for every reward object of the registry that it does not mention.

    Raises:
        ConfigError: the result has no rewards to train on.
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


def name_rewards(data: dict[str, Any], registry: Registry) -> Registry:
    """Replace rewards passed from Python in a config's data by names, in place.

    Args:
        data: `rewards`, and `rewards` in `evaluation`, are an entry, a list of entries, or a mapping from names to
            rewards, whose weights are 1. An entry is as in a run config, and its name may be the reward itself; or it
            is the reward, or its name.
        registry: the plugins.

    Returns:
        A registry that knows the rewards by their names.

    Raises:
        PluginError: one is not a reward, or a plugin has its name; with the key.
    """
    if isinstance(rewards := data.get("rewards"), Mapping) and "name" not in rewards:
        registry = registry.with_rewards(rewards)
        del data["rewards"]
    for key, holder in (("rewards", data), ("evaluation.rewards", data.get("evaluation"))):
        found = holder.get("rewards") if isinstance(holder, dict) else None
        if found is None or not isinstance(holder, dict):
            continue
        entries = holder["rewards"] = list(found) if isinstance(found, list | tuple) else [found]
        for i, entry in enumerate(entries):
            entry = {"name": entry} if isinstance(entry, str) or callable(entry) else entry
            if isinstance(entry, Mapping) and callable(code := entry.get("name")):
                wanted = entry.get("label") or code_name(code) or f"reward_{i + 1}"
                name = unused_name(wanted, registry.given)
                try:
                    registry = registry.with_rewards({name: code})
                except PluginError as error:
                    error.key = f"{key}.{i}"
                    raise
                entry = {**entry, "name": name}
            entries[i] = entry
    return registry


def new_output(config: Mapping[str, Any]) -> str:
    """Return a run folder for a config that names none: a new one in runs/, numbered, named after the rewards."""
    entries = config.get("rewards")
    terms = [term for term in (entries if isinstance(entries, list) else ()) if isinstance(term, Mapping)]
    labels = [str(term.get("label") or default_label(str(term.get("name")))) for term in terms]
    name = safe_name("-".join(labels) or "run", longest=60)
    numbers = [path.name.removeprefix(f"{name}-") for path in Path("runs").glob(f"{name}-*")]
    newest = max((int(number) for number in numbers if number.isdecimal()), default=0)
    return str(Path("runs") / f"{name}-{newest + 1:03d}")


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
