"""The run config: read, override, check and write it. No torch.

    registry = default_registry()
    config = load_config("run.yaml", ["training.steps=20"], registry=registry)

Everything wrong with a file is reported at once, each with the key's full path and its line. Reward options are
checked by the reward's own options class, without importing the reward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from alignprop_core.config.aliases import upgraded
from alignprop_core.config.given import given_to_run, was_given
from alignprop_core.config.input import apply_overrides, resolve_paths
from alignprop_core.config.rewards import loader_in
from alignprop_core.config.sections import (
    RunConfig,
)
from alignprop_core.config.yaml import Lines, dump_yaml, read_yaml
from alignprop_core.errors import ConfigError, PluginError, UserError
from alignprop_core.registry.offers import matching
from alignprop_core.registry.registry import Registry, default_registry
from alignprop_core.validation import InvalidConfig, Key, Problem, dotted, explain, shown


def load_config(path: str | Path, overrides: Sequence[str] = (), *, registry: Registry | None = None) -> RunConfig:
    """Read a run config from a YAML file.

    Args:
        path: the file. Paths of input files in it are relative to its folder; `output` to the working directory.
        overrides: `key.path=value`, values in YAML, lists by index (`rewards.0.weight=2`). Paths in them are relative
            to the working directory.
        registry: the plugins that names are looked up in; the installed ones if None.

    Raises:
        ConfigError: the file is missing or is no YAML, or anything in it is wrong.
    """
    registry = registry or default_registry()
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such run config. Give the path of a YAML file.") from None
    except IsADirectoryError:
        inside = path / "config.yaml"
        hint = f" Do you mean {inside}?" if inside.is_file() else ""
        raise ConfigError(f"{path}: is a folder, not a run config.{hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}.") from error
    data, lines = read_yaml(text, str(path))
    if path.name == "config.yaml" and (path.parent / "environment.json").is_file() and isinstance(data, dict):
        data = upgraded(data)
    return _parse(data, lines, source=str(path), overrides=overrides, registry=registry, folder=path.parent)


def parse_config(
    data: Mapping[str, Any],
    *,
    registry: Registry,
    source: str = "config",
    overrides: Sequence[str] = (),
    folder: Path | None = None,
) -> RunConfig:
    """Check data in the shape of a run config.

    Args:
        data: what a run config file holds, as mappings and lists.
        registry: the plugins that names are looked up in.
        source: what to call it in errors.
        overrides: as for `load_config`.
        folder: where relative paths of input files start; the working directory if None.

    Raises:
        ConfigError: with one line for everything that is wrong.
    """
    return _parse(data, {}, source=source, overrides=overrides, registry=registry, folder=folder)


@contextmanager
def located(path: str | Path, overrides: Sequence[str] = ()) -> Iterator[None]:
    """Give errors raised inside, that name a key of a run config, the file and line where that key stands.

    Args:
        path: the run config's file.
        overrides: what was given with it.
    """
    try:
        yield
    except UserError as error:
        if error.key is not None and not error.key.startswith("-"):  # options of commands stand in no file
            data, lines = read_yaml(Path(path).read_text(encoding="utf-8-sig"), str(path))
            _, overridden = apply_overrides(data, overrides)
            key = tuple(int(part) if part.isdecimal() else part for part in error.key.split("."))
            error.key = _place(key, lines, str(path), overridden)
        raise


def resolved_yaml(config: RunConfig) -> str:
    """Return a complete run config as YAML: every key, defaults included; it loads again to an equal config."""
    return dump_yaml(config.model_dump(mode="json"))


def _parse(
    data: object, lines: Lines, *, source: str, overrides: Sequence[str], registry: Registry, folder: Path | None
) -> RunConfig:
    if data is None:
        data = {}
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source}: must hold keys such as model, prompts, rewards and output, not {shown(data)}.")
    data, overridden = apply_overrides(data, overrides)
    problems = resolve_paths(data, folder=folder or Path(), overridden=overridden, registry=registry)
    wrong = {problem.path for problem in problems}
    _add_given(data, registry)
    gone = {} if folder is None else {name: was_given(name, k, folder) for name, k in given_to_run(folder).items()}
    problems += [problem for problem in _check_rewards(data, registry, gone) if problem.path not in wrong]
    config = None
    try:
        config = RunConfig.model_validate(data, context={"registry": registry})
    except ValidationError as error:
        problems = explain(error, RunConfig) + problems
    if "rewards" not in data and not any(problem.path == ("rewards",) for problem in problems):
        problems.append(Problem(("rewards",), "is required."))  # only an object from Python may stand for it
    if problems or config is None:
        raise InvalidConfig(problems, _report(problems, lines, source, overridden))
    return config


def _add_given(data: dict[str, Any], registry: Registry) -> None:
    """Train, with weight 1, on rewards passed from Python that the config does not mention, in place."""
    evaluation = data.get("evaluation")
    lists = [data.get("rewards"), evaluation.get("rewards") if isinstance(evaluation, dict) else None]
    named = {term.get("name") for terms in lists if isinstance(terms, list) for term in terms if isinstance(term, dict)}
    added = [{"name": name} for name in registry.given if name not in named]
    if added and (data.get("rewards") is None or isinstance(data["rewards"], list)):
        data["rewards"] = [*(data.get("rewards") or []), *added]


def _check_rewards(data: dict[str, Any], registry: Registry, gone: Mapping[str, str]) -> list[Problem]:
    """Check every term's name and options, and fill in the options' defaults, in place.

    `gone` says what became of names that meant objects passed from Python when the config was written.
    """
    evaluation = data.get("evaluation")
    places: list[tuple[Key, object]] = [(("rewards",), data.get("rewards"))]
    if isinstance(evaluation, dict):
        places.append((("evaluation", "rewards"), evaluation.get("rewards")))
    return [
        problem
        for place, terms in places
        for i, term in enumerate(terms if isinstance(terms, list) else ())
        if isinstance(term, dict) and isinstance(term.get("name"), str) and term["name"]
        for problem in _check_term(term, (*place, i), registry, gone, trains=place == ("rewards",))
    ]


def _check_term(
    term: dict[str, Any], place: Key, registry: Registry, gone: Mapping[str, str], *, trains: bool
) -> list[Problem]:
    name = term["name"]
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


def _report(problems: Sequence[Problem], lines: Lines, source: str, overridden: set[Key]) -> str:
    """Write the problems in the file's order, each with the line of its key or of the section it is missing in."""
    if len(problems) == 1:
        return f"{_place(problems[0].path, lines, source, overridden)}: {problems[0].message}"
    ordered = sorted(problems, key=lambda problem: _line(problem.path, lines))
    places = [f"line {at}: " if (at := _line(problem.path, lines)) else "" for problem in ordered]
    listed = [
        f"  {place}{_named(problem.path, overridden)}: {problem.message}"
        for place, problem in zip(places, ordered, strict=True)
    ]
    return "\n".join([f"{source}: {len(problems)} problems", *listed])


def _place(path: Key, lines: Lines, source: str, overridden: set[Key]) -> str:
    """Return `run.yaml:12: rewards.0.weight`."""
    at = _line(path, lines)
    return f"{source}{f':{at}' if at else ''}: {_named(path, overridden)}"


def _line(path: Key, lines: Lines) -> int:
    """Return the line of a key, or of the innermost section that holds it; 0 for none."""
    while path and path not in lines:
        path = path[:-1]
    return lines[path] if path else 0


def _named(path: Key, overridden: set[Key]) -> str:
    given = any(path[: len(done)] == done for done in overridden)
    return f"{dotted(path)}{' (from the command line)' if given else ''}"
