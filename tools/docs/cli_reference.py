"""The command-line reference: a Markdown page of the commands of the core and of the installed plugins."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer

from alignprop_core.cli import app
from alignprop_core.cli.extensions import LazyCommand

KINDS = {str: "text", int: "integer", float: "number", Path: "path", bool: "flag"}


def commands() -> Iterator[tuple[str, Any]]:
    """Yield each command's full name and object: `alignprop` first, then depth first, in the order of --help."""
    yield from _walk("alignprop", typer.main.get_command(app), None)


def reference() -> str:
    """Return the generated part of the page: a section for each command."""
    parts = [_section(name, command, depth) for depth, name, command in _sections()]
    return "\n".join(parts)


def overview() -> str:
    """Return a table of all commands with the first sentence of their help."""
    lines = ["| command | what it does |", "| --- | --- |"]
    for name, command in commands():
        if not hasattr(command, "list_commands"):
            lines.append(f"| [`{name}`](#{_anchor(name)}) | {_cell(_sentence(command.help or ''))} |")
    return "\n".join([*lines, ""])


def _sections() -> Iterator[tuple[int, str, Any]]:
    for name, command in commands():
        yield name.count(" "), name, command


def _walk(name: str, command: Any, parent: Any) -> Iterator[tuple[str, Any]]:
    yield name, command
    if hasattr(command, "list_commands"):
        context = command.make_context(name.split()[-1], [], parent=parent, resilient_parsing=True)
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            if isinstance(found, LazyCommand):  # a plugin's command, whose parameters are known once it is imported
                found = found.load()
            if found is not None and not found.hidden:
                yield from _walk(f"{name} {child}", found, context)


def _section(name: str, command: Any, depth: int) -> str:
    group = hasattr(command, "list_commands")
    lines = [f"{'#' * (2 if depth < 2 else 3)} {name}", ""]
    lines += [_prose(command.help or ""), ""]
    if group and depth:
        return "\n".join(lines)
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    usage = [name, *(_argument(p) for p in arguments), *(["[OPTIONS]"] if options else [])]
    lines += ["```text", " ".join([*usage, *(["COMMAND"] if group else [])]), "```", ""]
    if arguments:
        lines += ["| argument | type | default | description |", "| --- | --- | --- | --- |"]
        lines += [_row(f"`{_argument(p)}`", p) for p in arguments]
        lines.append("")
    if options:
        lines += ["| option | type | default | description |", "| --- | --- | --- | --- |"]
        lines += [_row(", ".join(f"`{flag}`" for flag in [*p.opts, *p.secondary_opts]), p) for p in options]
        lines.append("")
    return "\n".join(lines)


def _argument(parameter: Any) -> str:
    """Return an argument as in a usage line: NAME, [NAME], NAME..."""
    name = parameter.metavar or parameter.name.upper()
    if name.startswith("["):
        return str(name)
    name = name.removesuffix("...") + ("..." if parameter.nargs == -1 else "")
    return str(name if parameter.required else f"[{name}]")


def _row(name: str, parameter: Any) -> str:
    default = "required" if parameter.required else _default(parameter.default)
    return f"| {_cell(name)} | {_cell(_type(parameter))} | {default} | {_cell(parameter.help or '')} |"


def _type(parameter: Any) -> str:
    """Return a parameter's type with its limits, from the annotation in the command's signature."""
    kind = parameter.type_descriptor.annotation
    if get_origin(kind) is list:
        (kind,) = get_args(kind)
    if get_origin(kind) is Literal or (isinstance(kind, type) and issubclass(kind, Enum)):
        values = get_args(kind) or [member.value for member in kind]
        name = ", ".join(f"`{value}`" for value in values)
    else:
        name = KINDS.get(kind, getattr(kind, "__name__", str(kind)))
    limits = ((">=", parameter.min), ("<=", parameter.max))
    name = " ".join([name, *(f"{sign} {bound:g}" for sign, bound in limits if bound is not None)])
    return f"{name}, repeatable" if parameter.multiple else name


def _default(value: object) -> str:
    if isinstance(value, Enum):
        value = value.value
    return f"`{value}`" if value or (isinstance(value, int | float) and not isinstance(value, bool)) else ""


def _prose(text: str) -> str:
    return inspect.cleandoc(text).replace("\b\n", "")


def _sentence(text: str) -> str:
    return re.split(r"\.(?=\s|$)", inspect.cleandoc(text), maxsplit=1)[0].replace("\n", " ")


def _anchor(name: str) -> str:
    """Return the anchor that mkdocs gives a command's heading."""
    return name.replace(" ", "-")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
