"""Write the tables of docs/configuration.md and docs/rewards.md from the code that defines them.

    python docs/generate.py

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; the rest of a page is written by hand. A test
fails when a page is out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from alignprop_core.config import RunConfig
from alignprop_core.registry import Registry

DOCS = Path(__file__).parent
LIMITS = {"minimum": ">= {}", "exclusiveMinimum": "> {}", "maximum": "<= {}", "exclusiveMaximum": "< {}"}


def config_tables() -> str:
    """Return a table for every section of the run config."""
    schema = RunConfig.model_json_schema()
    return "\n".join(_section("", schema, schema["$defs"], {}))


def reward_table(folder: Path) -> str:
    """Return a table of the rewards that the distributions in this repository's plugins/ offer."""
    own = {path.parent.name for path in folder.glob("*/pyproject.toml")}
    lines = [
        "| reward | what it is | unit | gradient | reads prompts | plugin |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    offers = [offer for offer in Registry.discover({}).rewards() if offer.distribution in own]
    for offer in sorted(offers, key=lambda offer: (offer.distribution, offer.spec.name)):
        spec = offer.spec
        cells = (spec.summary, spec.unit, _yes(spec.differentiable), _yes(spec.needs_prompts), offer.distribution)
        lines.append(f"| `{spec.name}` | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def pages() -> dict[Path, str]:
    """Return what each page with tables should hold."""
    tables = {"configuration.md": config_tables(), "rewards.md": reward_table(DOCS.parent / "plugins")}
    return {DOCS / name: _fill((DOCS / name).read_text(encoding="utf-8"), table) for name, table in tables.items()}


def _fill(page: str, table: str) -> str:
    begin, end = "<!-- begin table -->\n", "<!-- end table -->"
    head, rest = page.split(begin)
    return f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def _section(
    prefix: str, schema: dict[str, Any], definitions: dict[str, Any], described: dict[str, str]
) -> Iterator[str]:
    """Yield the lines of a section's table, then of the sections in it; `described` says where each stands."""
    if prefix:
        yield f"## `{prefix}`\n"
    yield f"{schema['description']}\n"
    yield "| key | value | default | what it does |"
    yield "| --- | --- | --- | --- |"
    inner = []
    for name, field in schema["properties"].items():
        path = f"{prefix}.{name}" if prefix else name
        section = _reference(field)
        told = field.get("description") or (definitions[section]["description"] if section else "")
        if section and section in described:
            told += f" Keys as under `{described[section]}`."
        elif section:
            described[section] = path
            inner.append((path, definitions[section]))
        required = name in schema.get("required", [])
        default = (
            "required" if required else "below" if section and isinstance(field["default"], dict) else _value(field)
        )
        yield f"| `{path}` | {_type(field)} | {default} | {_cell(told)} |"
    yield ""
    for path, section_schema in inner:
        yield from _section(path, section_schema, definitions, described)


def _reference(field: dict[str, Any]) -> str | None:
    """Return the section a key holds, or the section of its list's items."""
    place = field.get("items", field)
    reference = place.get("$ref") or next((part["$ref"] for part in place.get("allOf", ()) if "$ref" in part), None)
    return reference.rpartition("/")[2] if reference else None


def _type(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        kinds = [_type(part) for part in field["anyOf"]]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in field or "const" in field:
        return ", ".join(f"`{_written(value)}`" for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return "list of sections" if _reference(field) else f"list of {_type(field['items'])}"
    if _reference(field):
        return "section"
    kind = {"string": "text", "integer": "whole number", "boolean": "true or false", "object": "mapping"}.get(
        field.get("type", ""), field.get("type", "any")
    )
    limits = [
        text.format(f"{field[key]:g}") for key, text in LIMITS.items() if key in field and abs(field[key]) < 2**53
    ]
    return " ".join([kind, ", ".join(limits)]).strip()


def _value(field: dict[str, Any]) -> str:
    return f"`{_written(field['default'])}`" if field.get("default") != "" else "empty"


def _written(value: object) -> str:
    """Write a value as it stands in YAML."""
    if isinstance(value, float):
        return f"{value:g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}".replace("e-0", "e-")
    text: str = yaml.safe_dump(value, default_flow_style=True).strip()
    return text.removesuffix("...").strip().strip("'")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
        sys.stdout.write(f"{page.name} written\n")
