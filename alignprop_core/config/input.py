"""From what a user wrote to data ready to validate: command-line overrides and paths. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignprop_core.config.yaml import read_yaml
from alignprop_core.errors import ConfigError, PluginError
from alignprop_core.locate import PARTS, PASSED
from alignprop_core.registry.local import absolute_name
from alignprop_core.validation import InvalidConfig, Key, Problem, dotted

if TYPE_CHECKING:
    from alignprop_core.registry.registry import Registry

PROMPT_SUFFIXES = (".txt", ".jsonl")
_FILE_SUFFIXES = (*PROMPT_SUFFIXES, ".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".json", ".csv")


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], set[Key]]:
    """Set `key.path=value` pairs in a copy of the data.

    Sections that are not there are made; a list takes an index, one past its end appends. Values are YAML.

    Returns:
        The new data, and the paths that were set.
    """
    changed: dict[str, Any] = deepcopy(dict(data))
    done: set[Key] = set()
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip().removeprefix("--")
        try:
            if not equals or not key or "" in key.split("."):
                raise ConfigError("write key.path=value, such as training.steps=20.")
            value, _ = read_yaml(text, f"the value of {key}")
            done.add(_set(changed, key.split("."), value))
        except ConfigError as error:
            problems.append(Problem((override,), str(error)))
    if problems:
        raise InvalidConfig(problems, "\n".join(f'override "{p.key}": {p.message}' for p in problems))
    return changed, done


def _set(data: dict[str, Any], parts: list[str], value: object) -> Key:
    here: Any = data
    path: list[str | int] = []
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        # What is missing on the way becomes a section, or a list where the next part is an index.
        fresh: Any = value if last else [] if parts[i + 1].isdecimal() else {}
        key: str | int = part
        if isinstance(here, list):
            if not part.isdecimal() or int(part) > len(here):
                known = f"{'0 to ' * (len(here) > 1)}{len(here) - 1}, or {len(here)} to append," if here else "0"
                raise ConfigError(f"{dotted(path)} is a list: write an index {known} where it says {part}.")
            key = int(part)
            if key == len(here):
                here.append(None)
        elif not isinstance(here, dict):
            raise ConfigError(f"{dotted(path)} is a single value and has no {part} inside.")
        elif part not in here:
            here[part] = None
        if last or here[key] is None:
            here[key] = fresh
        here = here[key]
        path.append(key)
    return tuple(path)


def merge_sections(data: Mapping[str, Any], sections: Mapping[str, Any]) -> tuple[dict[str, Any], set[Key]]:
    """Return the data with sections given from Python in place of its own, key by key, and the paths that were set."""
    merged, done = dict(data), set[Key]()
    for name, value in sections.items():
        own = merged.get(name)
        if isinstance(value, Mapping) and isinstance(own, Mapping):
            merged[name] = {**own, **value}
            done |= {(name, key) for key in value}
        else:
            merged[name] = value
            done.add((name,))
    return merged, done


def resolve_paths(
    data: dict[str, Any], *, folder: Path, overridden: Collection[Key], registry: Registry
) -> list[Problem]:
    """Make the paths in the data absolute, in place; registered names and hub ids stay as they are.

    Input files are relative to the config's folder (to the working directory if given on the command line or from
    Python), the output to the working directory. A bare name that is missing in the config's folder may also be a file
    in the working directory. Returns a problem for every name that no installed plugin offers.
    """
    problems: list[Problem] = []
    for kind, path, holder in list(_path_values(data, registry)):
        start = Path() if any(path[: len(done)] == done for done in overridden) else folder
        try:
            holder[path[-1]] = _resolved(kind, path, holder[path[-1]], start, registry)
        except PluginError as error:
            problems.append(Problem(path, str(error)))
    return problems


def _resolved(kind: str, path: Key, written: str, start: Path, registry: Registry) -> str:
    """Return a value as an absolute path if it is one, else as it is.

    Raises:
        PluginError: no installed plugin offers the name, or it names a Python file without an explicit path.
    """
    if kind != "option" or written.startswith("$"):
        written = os.path.expandvars(written)
        if variable := re.match(r"\$\{?\w+\}?", written):
            raise PluginError(f"the environment variable {variable[0]} is not set.")
    if kind == "output":
        return str(Path(written).expanduser().absolute())
    if kind == "reward":
        return absolute_name(written, start)
    if kind == "loader":
        # Links are kept: a virtual environment's Python is a link, and its target belongs to another environment.
        return os.path.abspath(start / Path(written).expanduser())
    if kind == "option":
        named = written.startswith(("./", "../", "~/")) or (path[-1] == "weights" and (start / written).is_file())
        return _absolute(start, written) if named else written
    if kind == "model" and (written.startswith(PASSED) or registry.find_model(written) is not None):
        return written
    if kind == "prompts" and registry.find_prompt_set(written) is not None:
        return written
    if _is_path(written, start):
        return _absolute(start, written)
    if Path(written).exists():
        # Something like runs/first, written where the run was started from: no hub id anybody means.
        return _absolute(Path(), written)
    otherwise = ""
    try:
        if kind == "prompts":
            otherwise = "the path of a .txt or .jsonl file, or a list of prompts"
            registry.prompt_set(written)
        elif kind == "model" and written.count("/") != 1:
            # A hub id of a diffusers model is always owner/name; a bare word is a misspelt registered name.
            otherwise = "a folder, a .safetensors file or a hub id (owner/name)"
            registry.model(written)
    except PluginError as error:
        raise PluginError(f"{error} Or give {otherwise}.") from None
    return written


def reward_terms(data: dict[str, Any]) -> Iterator[tuple[Key, dict[str, Any]]]:
    """Yield path and entry of every reward in the data, those that are only evaluated included."""
    for place in (("rewards",), ("evaluation", "rewards")):
        terms = _at(data, place)
        for i, term in enumerate(terms if isinstance(terms, list) else ()):
            if isinstance(term, dict):
                yield (*place, i), term


def _at(data: Any, path: Key) -> Any:
    """Return the value at a path; None if there is none."""
    for key in path:
        if isinstance(data, dict):
            data = data.get(key)
        else:
            data = data[key] if isinstance(data, list) and isinstance(key, int) else None
    return data


def _path_values(data: dict[str, Any], registry: Registry) -> Iterator[tuple[str, Key, dict[str | int, Any]]]:
    """Yield (kind, path, container) of every value that may be a path."""
    places: list[tuple[str, Key]] = [
        ("model", ("model", "base")),
        *(("file", ("model", part)) for part in PARTS),
        ("file", ("lora", "init_from")),
        ("prompts", ("prompts", "train")),
        ("prompts", ("prompts", "heldout")),
        ("output", ("output",)),
    ]
    loras = _at(data, ("model", "loras"))
    places += [("file", ("model", "loras", i, "path")) for i in range(len(loras) if isinstance(loras, list) else 0)]
    for place, term in reward_terms(data):
        places.append(("reward", (*place, "name")))
        for loader in (offer.name for offer in registry.loaders() if isinstance(term.get(offer.name), dict)):
            places += [("loader", (*place, loader, key)) for key in _path_fields(loader, registry)]
        options = term.get("options")
        places += [("option", (*place, "options", key)) for key in (options if isinstance(options, dict) else ())]
    for kind, path in places:
        holder = _at(data, path[:-1])
        if isinstance(holder, dict) and isinstance(value := holder.get(path[-1]), str) and value:
            yield kind, path, holder


def _path_fields(loader: str, registry: Registry) -> list[str]:
    """Return the fields of a loader's config that are marked as paths; none where its config class is not available."""
    try:
        fields = registry.loader_config_class(loader).model_fields.items()
    except PluginError:
        return []  # reported where the entry is validated
    extras = {name: field.json_schema_extra for name, field in fields}
    return [name for name, extra in extras.items() if isinstance(extra, dict) and extra.get("format") == "path"]


def _is_path(written: str, start: Path) -> bool:
    explicit = written.startswith(("./", "../", "~", "/")) or written in (".", "..") or Path(written).is_absolute()
    return explicit or written.lower().endswith(_FILE_SUFFIXES) or (start / written).exists()


def _absolute(start: Path, written: str) -> str:
    # os.path.normpath would resolve ".." through symbolic links wrongly; resolve() follows them.
    return str((start / Path(written).expanduser()).resolve())
