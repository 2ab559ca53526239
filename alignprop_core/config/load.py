"""The run config: read, override, check and write it. No torch.

    registry = default_registry()
    config = load_config("run.yaml", ["training.steps=20"], registry=registry)

Everything wrong with a file is reported at once, each with the key's full path and its line. Reward options are
checked by the reward's own options class, without importing the reward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from alignprop_core.config.aliases import upgraded
from alignprop_core.config.given import given_to_run, was_given
from alignprop_core.config.input import apply_overrides, merge_sections, resolve_paths, reward_terms
from alignprop_core.config.rewards import loader_in
from alignprop_core.config.sections import RunConfig
from alignprop_core.config.yaml import Lines, dump_yaml, read_yaml
from alignprop_core.errors import ConfigError, PluginError, UserError
from alignprop_core.registry.offers import matching
from alignprop_core.registry.registry import Registry, default_registry
from alignprop_core.validation import InvalidConfig, Key, Problem, dotted, explain, shown

Given = str | Path | Mapping[str, Any] | RunConfig
"""A run config as it is given: the path of a YAML file, its data, or a checked config."""


def load_config(
    config: Given,
    overrides: Sequence[str] = (),
    *,
    registry: Registry | None = None,
    sections: Mapping[str, Any] | None = None,
    default_output: Callable[[Mapping[str, Any]], str] | None = None,
) -> RunConfig:
    """Read and check a run config.

    Args:
        config: a YAML file, or its data. Paths of input files in a file are relative to its folder; other paths, and
            `output`, to the working directory.
        overrides: `key.path=value`, values in YAML, lists by index (`rewards.0.weight=2`). Paths in them are relative
            to the working directory.
        registry: the plugins that names are looked up in; the installed ones if None.
        sections: sections that replace those of the config, key by key. Paths as in `overrides`.
        default_output: chooses the output of data that names none.

    Raises:
        ConfigError: the file is missing or is not YAML, or anything in it is wrong.
    """
    if isinstance(config, RunConfig) and not overrides and not sections:
        return config
    registry = registry or default_registry()
    data, lines, source, folder = _read(config)
    if data is None:
        data = {}
    if not isinstance(data, Mapping):
        keys = "must contain keys such as model, prompts, rewards and output"
        raise ConfigError(f"{source or 'run config'}: {keys}, not {shown(data)}.")
    data, overridden = _changed(data, overrides, sections or {})
    overridden = overridden if source else {}  # without a file everything is from Python
    if default_output is not None and data.get("output") is None:
        data["output"] = default_output(data)
    problems = resolve_paths(data, folder=folder or Path(), overridden=overridden, registry=registry)
    wrong = {problem.path for problem in problems}
    _add_given(data, registry)
    gone = {} if folder is None else {name: was_given(name, k, folder) for name, k in given_to_run(folder).items()}
    for place, term in reward_terms(data):
        problems += [found for found in _check_term(term, place, registry, gone) if found.path not in wrong]
    valid = None
    try:
        valid = RunConfig.model_validate(data, context={"registry": registry})
    except ValidationError as error:
        problems = explain(error, RunConfig) + problems
    if "rewards" not in data and not any(problem.path == ("rewards",) for problem in problems):
        problems.append(Problem(("rewards",), "is required."))  # only an object from Python may stand for it
    if problems or valid is None:
        raise InvalidConfig(problems, _report(problems, lines, source, overridden))
    return valid


def read_run(folder: Path) -> dict[str, Any]:
    """Return the data of a run folder's config.yaml, unchecked, with today's names of keys."""
    path = folder / "config.yaml"
    data, _ = read_yaml(path.read_text(encoding="utf-8"), str(path))
    return upgraded(data)


def _read(config: Given) -> tuple[Any, Lines, str, Path | None]:
    """Return the data, the lines of its keys, the name of the source in messages, and where its paths start."""
    if isinstance(config, RunConfig):
        return config.model_dump(mode="json"), {}, "", None
    if not isinstance(config, str | Path):
        return config, {}, "", None
    path = Path(config)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such run config. Give the path of a YAML file.") from None
    except IsADirectoryError:
        inside = path / "config.yaml"
        hint = f" Did you mean {inside}?" if inside.is_file() else ""
        raise ConfigError(f"{path}: is a folder, not a run config.{hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}.") from error
    data, lines = read_yaml(text, str(path))
    if path.name == "config.yaml" and (path.parent / "environment.json").is_file() and isinstance(data, dict):
        data = upgraded(data)
    return data, lines, str(path), path.parent


@contextmanager
def located(
    config: Given, overrides: Sequence[str] = (), *, sections: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Add file and line to errors raised inside that name a key of a run config.

    Args:
        config: the run config; only a file has lines.
        overrides: overrides given with it.
        sections: sections given with it.
    """
    try:
        yield
    except UserError as error:
        # Options of commands are in no file.
        if error.key is not None and not error.key.startswith("-") and isinstance(config, str | Path):
            data, lines, source, _ = _read(config)
            _, origins = _changed(data, overrides, sections or {})
            key = tuple(int(part) if part.isdecimal() else part for part in error.key.split("."))
            error.key = _place(key, lines, source, origins)
        raise


def resolved_yaml(config: RunConfig) -> str:
    """Return a complete run config as YAML: every key, defaults included; it loads again to an equal config."""
    return dump_yaml(config.model_dump(mode="json"))


Origins = dict[Key, str]
"""Where values come from that are not the config's own: " (from the command line)", by path."""


def _changed(
    data: Mapping[str, Any], overrides: Sequence[str], sections: Mapping[str, Any]
) -> tuple[dict[str, Any], Origins]:
    """Return the data with sections and overrides, and where they come from."""
    merged, from_python = merge_sections(data, sections)
    changed, done = apply_overrides(merged, overrides)
    return changed, dict.fromkeys(from_python, " (from Python)") | dict.fromkeys(done, " (from the command line)")


def _add_given(data: dict[str, Any], registry: Registry) -> None:
    """Train, with weight 1, on rewards passed from Python that the config does not mention, in place."""
    named = [term.get("name") for _, term in reward_terms(data)]
    added = [{"name": name} for name in registry.given if name not in named]
    if added and (data.get("rewards") is None or isinstance(data["rewards"], list)):
        data["rewards"] = [*(data.get("rewards") or []), *added]


def _check_term(term: dict[str, Any], place: Key, registry: Registry, gone: Mapping[str, str]) -> list[Problem]:
    """Check a term's name and options, and fill in the options' defaults, in place.

    `gone` says what became of names that meant objects passed from Python when the config was written.
    """
    name, trains = term.get("name"), place[0] == "rewards"
    if not isinstance(name, str) or not name:
        return []
    if name in gone and name not in registry.given and not matching(name, registry.rewards()):
        return [Problem((*place, "name"), gone[name])]
    try:
        loader = loader_in(term, registry)
    except (InvalidConfig, PluginError):
        return []  # the run config's own check reports it
    try:
        source = registry.source(loader)
        spec = source.reward(name).spec
        if trains and not spec.differentiable:
            return [
                Problem((*place, "name"), f'"{name}" gives no gradient to train on; use it under evaluation.rewards.')
            ]
        if trains and spec.scope == "batch":
            return [Problem((*place, "name"), f'"{name}" compares samples; use it under evaluation.rewards.')]
        options = term.get("options")
        if options is None:
            options = {}
        if isinstance(options, dict):
            checked = source.reward_options(name, options, where=dotted((*place, "options")))
            term["options"] = checked if isinstance(checked, dict) else checked.model_dump(mode="json")
    except InvalidConfig as error:
        return [Problem((*place, "options", *problem.path), problem.message) for problem in error.problems]
    except PluginError as error:
        return [Problem((*place, "name"), str(error))]
    return []


def _report(problems: Sequence[Problem], lines: Lines, source: str, overridden: Origins) -> str:
    """Write the problems in the file's order, each with the line of its key or of the section it is missing in."""
    if len(problems) == 1:
        return f"{_place(problems[0].path, lines, source, overridden)}: {problems[0].message}"
    listed = []
    for problem in sorted(problems, key=lambda problem: _line(problem.path, lines)):
        at = _line(problem.path, lines)
        listed.append(f"  {f'line {at}: ' if at else ''}{_named(problem.path, overridden)}: {problem.message}")
    return "\n".join([f"{source or 'run config'}: {len(problems)} problems", *listed])


def _place(path: Key, lines: Lines, source: str, overridden: Origins) -> str:
    """Return `run.yaml:12: rewards.0.weight`, without the file if there is none."""
    if not source:
        return dotted(path)
    at = _line(path, lines)
    return f"{source}{f':{at}' if at else ''}: {_named(path, overridden)}"


def _line(path: Key, lines: Lines) -> int:
    """Return the line of a key, or of the innermost section that contains it; 0 for none."""
    while path and path not in lines:
        path = path[:-1]
    return lines[path] if path else 0


def _named(path: Key, overridden: Origins) -> str:
    return dotted(path) + next((origin for done, origin in overridden.items() if path[: len(done)] == done), "")
