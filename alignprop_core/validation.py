"""From pydantic's errors to messages that name the key, what is wrong, and what to write instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from alignprop_core.errors import ConfigError

Key = tuple[str | int, ...]


class Problems(ValueError):
    """Values that are valid one by one but not together; each with the key it is reported under."""

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{key}: {message}" for key, message in problems))
        self.problems = tuple(problems)


@dataclass(frozen=True)
class Problem:
    """One problem of a config."""

    path: Key
    message: str

    @property
    def key(self) -> str:
        """The key's full path, such as `rewards.0.options.quality`."""
        return dotted(self.path)


class InvalidConfig(ConfigError):
    """A config with problems; the message lists them all.

    Attributes:
        problems: one for every wrong key; paths start at the config (at the options, if those alone were checked).
    """

    def __init__(self, problems: Sequence[Problem], message: str) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


def invalid(problems: Sequence[Problem], where: str) -> InvalidConfig:
    """Return the error for problems of one value of a config, one line for each; `where` is the value's key."""
    return InvalidConfig(problems, "\n".join(f"{where}.{problem.key}: {problem.message}" for problem in problems))


def dotted(path: Sequence[str | int]) -> str:
    """Write a path with dots."""
    return ".".join(str(part) for part in path)


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the full path of every key of a model; a list item's index is written 0."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        yield path
        for part in _models_in(field.annotation):
            yield from keys_of(part[0], f"{path}.{'0.' if part[1] else ''}")


def _models_in(annotation: Any, in_list: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, in_list
        return
    origin = get_origin(annotation)
    if origin in (Union, UnionType, Annotated, list, tuple):
        for argument in get_args(annotation):
            if not isinstance(argument, (str, int)):
                yield from _models_in(argument, in_list or origin in (list, tuple))


def explain(error: ValidationError, model: type[BaseModel], where: str = "") -> list[Problem]:
    """Return pydantic's errors as problems with messages of our own; several errors of one value become one message.

    Args:
        error: what validating raised.
        model: the class that was validated. Its class attributes `aliases` (name used elsewhere -> key here) and
            `formats` (key -> a description of its pattern), if it has them, improve the messages.
        where: key of that model in the run config; empty for the run config itself. Only messages show it.
    """
    grouped: dict[Key, list[Any]] = {}
    for item in error.errors(include_url=False):
        loc = _real_path(item["loc"], model)
        raised = item.get("ctx", {}).get("error")
        if isinstance(raised, Problems):
            for key, message in raised.problems:
                path = (*loc, *(key.split(".") if key else ()))
                grouped.setdefault(path, []).append({"type": "ours", "msg": message})
        else:
            grouped.setdefault(loc, []).append(item)
    return [Problem(path, _message(path, items, model, where)) for path, items in grouped.items()]


def _real_path(loc: tuple[str | int, ...], model: type[BaseModel]) -> Key:
    """Drop what pydantic adds to a path to name the member of a union it tried."""
    kept: list[str | int] = []
    here: Any = model
    for part in loc:
        inner = next((kind for kind, _ in _models_in(here)), None)
        if isinstance(part, int):
            kept.append(part)
            here = inner
        elif inner is not None and part != inner.__name__:
            kept.append(part)
            field = inner.model_fields.get(part)
            here = field.annotation if field else None
        elif get_origin(here) is dict or here is dict:
            kept.append(part)
            here = None
    return tuple(kept)


def _message(path: Key, items: list[Any], model: type[BaseModel], where: str) -> str:
    first = items[0]
    kind, context = first["type"], first.get("ctx", {})
    if kind == "ours":
        return str(first["msg"])
    if kind in ("extra_forbidden", "unknown_key"):
        return unknown_key(path, model, where, context.get("further", ()))
    if kind == "invalid_key":
        return "keys are text. Put it in quotes."
    if kind == "missing":
        return "is required."
    if kind == "value_error":
        return str(first["msg"]).removeprefix("Value error, ")
    wanted = " or ".join(dict.fromkeys(_wanted(item) for item in items))
    got = shown(first.get("input"))
    if kind == "string_pattern_mismatch":
        wanted = getattr(model, "formats", {}).get(path[-1], wanted)
    hint = ""
    if kind in ("literal_error", "enum") and isinstance(first.get("input"), str):
        known = [value.strip("'") for value in context.get("expected", "").replace(" or ", ", ").split(", ")]
        nearest = get_close_matches(first["input"], known, n=1)
        hint = f' Did you mean "{nearest[0]}"?' if nearest else ""
    return f"must be {wanted}, not {got}.{hint}"


_WANTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping (key: value)",
    "model_type": "a mapping (key: value)",
    "model_attributes_type": "a mapping (key: value)",
    "none_required": "null",
    "finite_number": "a finite number",
    "string_too_short": "text that is not empty",
}

_LIMITS = {
    "greater_than": "more than",
    "greater_than_equal": "at least",
    "less_than": "less than",
    "less_than_equal": "at most",
    "multiple_of": "a multiple of",
}
"""Errors about a number's limit, which their context contains."""


def _wanted(item: Any) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind in _WANTED:
        return _WANTED[kind]
    if kind in _LIMITS:
        (limit,) = context.values()
        return f"{_LIMITS[kind]} {limit:g}"
    if kind in ("literal_error", "enum"):
        return str(context["expected"]).replace("'", "")
    if kind == "too_short":
        return f"a list with at least {context['min_length']} entry"
    if kind == "string_pattern_mismatch":
        return f"text that matches {context['pattern']}"
    message = str(item["msg"])
    return message.removeprefix("Input should be ").removeprefix("Value error, ").rstrip(".")


def shown(value: object) -> str:
    """Return a value as short text for a message."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    if isinstance(value, dict):
        text = "a mapping" if value else "an empty mapping"
    elif isinstance(value, list):
        text = "a list" if value else "an empty list"
    elif isinstance(value, str):
        text = f'the text "{value}"'
    return text if len(text) <= 60 else f"{text[:57]}..."


def unknown_key(path: Key, model: type[BaseModel], where: str = "", further: Sequence[str] = ()) -> str:
    """Say that a key does not exist, and which one is probably meant: here, anywhere, or of another trainer.

    `further` are keys beside it that the model does not have as fields.
    """
    plain = tuple("0" if isinstance(part, int) else part for part in path)
    name, parent = str(plain[-1]), dotted(plain[:-1])
    every = list(dict.fromkeys(keys_of(model)))
    siblings = [key for key in every if key.rpartition(".")[0] == parent]
    siblings += [dotted([*plain[:-1], name]) for name in further]
    message = "unknown key."
    alike = name.lower().replace("-", "_")
    if renamed := getattr(model, "renamed", {}).get(dotted(plain)):
        return f"{message} It was renamed to {renamed}."
    aliases = getattr(model, "aliases", {})
    if alias := aliases.get(dotted(plain)) or aliases.get(alike):
        return f"{message} In alignprop this is {alias}."
    close = get_close_matches(name, [key.rpartition(".")[2] for key in siblings], n=1, cutoff=0.75)
    if close:
        return f"{message} Did you mean {dotted([*([where] if where else []), *path[:-1], close[0]])}?"
    same = [key for key in every if key.rpartition(".")[2] == name]
    if same:
        return f"{message} Did you mean {' or '.join(same[:3])}?"
    near = get_close_matches(name, [key.rpartition(".")[2] for key in every], n=1, cutoff=0.75)
    if near:
        return f"{message} Did you mean {next(key for key in every if key.rpartition('.')[2] == near[0])}?"
    known = f" Valid keys: {', '.join(key.rpartition('.')[2] for key in siblings)}."
    return message + (known if 0 < len(siblings) <= 20 else "")
