"""Reading and writing run configs as YAML, with the line of each key.

Safe loading only, with the scalars of YAML 1.2: `1e-3` is a number, `no` and `off` are strings (as in
`mixed_precision: no`), dates stay strings, and a key given twice is an error instead of a silent winner.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from alignprop_core.errors import ConfigError

Lines = dict[tuple[str | int, ...], int]
"""The line (from 1) of every key and list item, by its path."""

MAX_DEPTH = 50
MAX_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars, and unique keys."""

    # Empty, so that only the resolvers added below count; noqa because the types say it is an instance attribute.
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f'the key "{key.value}" appears twice; keep one', key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that writes nested lists indented, as people do, and no aliases."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?[0-9]+$|^0x[0-9a-fA-F]+$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$|^[-+]?[0-9]+[eE][-+]?[0-9]+$"
        r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$",
        "-+0123456789.",
    ),
    ("merge", r"^<<$", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))
    # The writer needs them too, so that it quotes a string such as "1e-3" that would come back as a number.
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> int:
    # YAML 1.1's own constructor reads 010 as octal 8.
    return int(node.value, 16 if node.value.startswith("0x") else 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)


def read_yaml(text: str, source: str) -> tuple[Any, Lines]:
    """Parse YAML text.

    Args:
        text: the document.
        source: what to call it in errors, such as the file's path.

    Returns:
        The data, and the line of every key.

    Raises:
        ConfigError: on a syntax error, with its line and column.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        lines: Lines = {}
        _note_lines(node, (), lines)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        snippet = (
            f"\n{text.splitlines()[mark.line]}\n{' ' * mark.column}^" if mark and text[mark.index :].strip() else ""
        )
        raise ConfigError(f"{place}: not valid YAML: {error.problem or error}.{snippet}") from error
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        raise ConfigError(f"{source}: not valid YAML: {error}.") from error


def _note_lines(node: yaml.Node, path: tuple[str | int, ...], lines: Lines) -> None:
    # A file of a few lines can hold billions of values through aliases of aliases, or one that holds itself.
    if len(path) > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    if len(lines) > MAX_VALUES:
        raise ValueError(f"contains more than {MAX_VALUES:,} values")
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                lines[(*path, key.value)] = key.start_mark.line + 1
                _note_lines(value, (*path, key.value), lines)
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _note_lines(item, (*path, i), lines)


def dump_yaml(data: object) -> str:
    """Write data as YAML that `read_yaml` gives back unchanged; keys keep their order."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text
