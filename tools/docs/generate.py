"""Write the generated parts of the docs: the package tree, and tables of config keys, commands, rewards and specs.

    python tools/docs/generate.py [--check]

Generated text is between `<!-- begin NAME -->` and `<!-- end NAME -->`; the rest of a page is written by hand. With
`--check` nothing is written, and the exit code is 1 if a page is out of date. A test runs that.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cli_reference
import yaml
from packaging.requirements import Requirement
from pydantic import BaseModel

from alignprop_core.config.schema import schema_with_loaders
from alignprop_core.registry.discovery import SPEC_OF_HOOK, PluginRecord
from alignprop_core.registry.registry import Registry
from alignprop_core.specs import PromptSpec, RewardSpec, WeightsFile, WeightsSpec
from alignprop_core.testing import CHECKS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FOLDERS = {
    "examples/": "Run configs, scripts, notebooks and plugins to copy",
    "docs/": "The site; decisions/ and results/ (each measurement with its command)",
    "tests/": "The core's tests and tests across distributions",
}
SPECS = (*SPEC_OF_HOOK.values(), WeightsFile)
NAMES_SHOWN = 6
TREE_WIDTH = 124
LIMITS = {"minimum": ">= {}", "exclusiveMinimum": "> {}", "maximum": "<= {}", "exclusiveMaximum": "< {}"}


def config_tables() -> str:
    """Return a table for every section of the run config, with the loader keys of this repository's plugins."""
    schema = schema_with_loaders(Registry.discover({}))
    return "\n".join(_section("", schema, schema["$defs"], {}))


def reward_table(folder: Path) -> str:
    """Return a table of the rewards that the distributions in this repository's plugins/ offer."""
    own = {path.parent.name for path in folder.glob("*/pyproject.toml")}
    lines = [
        "| reward | what it measures | unit | gradient | reads prompts | plugin |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    offers = [offer for offer in Registry.discover({}).rewards() if offer.distribution in own]
    for offer in sorted(offers, key=lambda offer: (offer.distribution, offer.spec.name)):
        spec = offer.spec
        cells = (spec.summary, spec.unit, _yes(spec.differentiable), _yes(spec.needs_prompts), offer.distribution)
        lines.append(f"| `{spec.name}` | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def spec_table(kind: type[BaseModel]) -> str:
    """Return a table of a spec's fields, those it must have first."""
    schema = kind.model_json_schema()
    required = schema.get("required", [])
    lines = ["| field | type | default | description |", "| --- | --- | --- | --- |"]
    for name, field in sorted(schema["properties"].items(), key=lambda item: item[0] not in required):
        default = "required" if name in required else _value(field)
        value = (
            f"list of [`{section}`][alignprop_core.specs.{section}]" if (section := _reference(field)) else _type(field)
        )
        lines.append(f"| `{name}` | {value} | {default} | {_cell(field['description'])} |")
    return "\n".join([*lines, ""])


def check_table() -> str:
    """Return a table of the conformance checks."""
    lines = ["| check | what it checks |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| `{check.name}` | {_cell(check.description)} |" for check in CHECKS), ""])


def plugin_table(folder: Path, registry: Registry) -> str:
    """Return a table of the distributions in a folder: description, what they provide, license, install command."""
    projects = {path.parent.name: _project(path) for path in sorted(folder.glob("*/pyproject.toml"))}
    projects = {name: project for name, project in projects.items() if "entry-points" in project}  # no metapackage
    records = {record.distribution: record for record in registry.plugins}
    lines = [
        "| plugin | description | provides | license | install from a checkout |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, project in projects.items():
        where = folder.relative_to(ROOT) / name
        needed = [Requirement(line).name for line in project["dependencies"]]
        install = [f"./{folder.relative_to(ROOT) / other}" for other in needed if other in projects] + [f"./{where}"]
        offers = "; ".join(_offers(records[name])) if name in records else _source_offers(folder / name, project)
        link = f"[{name}](https://github.com/alignprop/alignprop/tree/main/{where})"
        cells = (link, project["description"], offers, project["license"], f"`pip install {' '.join(install)}`")
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return "\n".join([*lines, ""])


def package_tree() -> str:
    """Return the packages of the core and the distributions, each with one line on what it is for."""
    lines = ["alignprop_core/"]
    for folder in sorted(path.parent for path in (ROOT / "alignprop_core").glob("*/__init__.py")):
        lines.append(_line(f"  {folder.name}/", _sentence(folder / "__init__.py")))
    lines.append("plugins/")
    for path in sorted((ROOT / "plugins").glob("*/pyproject.toml")):
        lines.append(_line(f"  {path.parent.name}/", _project(path)["description"]))
    lines += [_line(name, text) for name, text in FOLDERS.items()]
    return "\n".join(["```text", *lines, "```", ""])


def pages() -> dict[Path, str]:
    """Return what each page with generated parts should hold."""
    registry = Registry.discover({})
    parts = {
        ROOT / "README.md": {"tree": package_tree()},
        DOCS / "cli.md": {"overview": cli_reference.overview(), "commands": cli_reference.reference()},
        DOCS / "configuration.md": {"table": config_tables()},
        DOCS / "rewards.md": {"table": reward_table(ROOT / "plugins")},
        DOCS / "plugins.md": {
            "plugins": plugin_table(ROOT / "plugins", registry),
            "examples": plugin_table(ROOT / "examples" / "plugins", registry),
        },
        DOCS / "plugin-reference.md": {kind.__name__: spec_table(kind) for kind in SPECS} | {"checks": check_table()},
    }
    return {page: _filled(page, named) for page, named in parts.items()}


def _filled(page: Path, parts: dict[str, str]) -> str:
    text = page.read_text(encoding="utf-8")
    for name, part in parts.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{part}\n{end}{rest.split(end)[1]}"
    return text


def _project(path: Path) -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    return project


def _offers(record: PluginRecord) -> Iterator[str]:
    """Yield what a plugin provides, one kind at a time; long lists are cut off."""
    known = [hook for hook in SPEC_OF_HOOK if record.offers.get(hook)]
    for hook in [*known, *(hook for hook in record.offers if hook not in SPEC_OF_HOOK)]:
        kind, specs = SPEC_OF_HOOK.get(hook), record.offers[hook]
        names = list(dict.fromkeys(spec.name for spec in specs))
        listed = ", ".join(f"`{name}`" for name in names[:NAMES_SHOWN])
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        if kind is WeightsSpec:
            yield f"weights {listed} for {', '.join(f'`{spec.reward}`' for spec in specs)}"
        elif kind is PromptSpec:
            yield f"prompt sets {listed}{more}"
        elif kind is RewardSpec:
            yield listed
        else:  # the last word of a hook's name is what it registers, a plugin's own hooks included
            yield f"{hook.rpartition('_')[2]} {listed}{more}"


def _source_offers(folder: Path, project: dict[str, Any]) -> str:
    """Return the names in a plugin's specs, read from its source because it is not installed here.

    A distribution without an entry point, a metapackage, provides what it requires.
    """
    if "alignprop" not in project.get("entry-points", {}):
        return "installs " + ", ".join(f"`{Requirement(line).name}`" for line in project["dependencies"])
    names = []
    for module in (*folder.glob("*/__init__.py"), *folder.glob("src/*/__init__.py")):
        calls = [node for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        for call in calls:
            values = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
            if name := values.get("name", values.get("path")):  # a command has a path and no name
                names.append(name)
    return ", ".join(f"`{name}`" for name in names)


def _line(name: str, text: str) -> str:
    """Return a line of the tree; a description that is too long ends at a semicolon, a colon or its first comma."""
    width = TREE_WIDTH - 26
    for cut in (r"(.+); ", r"(.+): ", r"(.{30,}?), "):
        if len(text) > width and (found := re.match(cut, text)):
            text = found[1]
    return f"{name:<26}{text.rstrip('.')}"


def _sentence(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.split(r"\.(?=\s|$)", docstring, maxsplit=1)[0].replace("\n", " ").replace("`", "")


def _section(
    prefix: str, schema: dict[str, Any], definitions: dict[str, Any], described: dict[str, str]
) -> Iterator[str]:
    """Yield the lines of a section's table, then of the sections in it; `described` maps each section to its key."""
    if prefix:
        yield f"## `{prefix}`\n"
    yield f"{schema['description']}\n"
    yield "| key | type | default | description |"
    yield "| --- | --- | --- | --- |"
    inner = []
    for name, field in schema["properties"].items():
        path = f"{prefix}.{name}" if prefix else name
        section = _reference(field)
        text = field.get("description") or (definitions[section]["description"] if section else "")
        if section and section in described:
            text += f" Keys as under `{described[section]}`."
        elif section:
            described[section] = path
            inner.append((path, definitions[section]))
        required = name in schema.get("required", [])
        default = (
            "required" if required else "below" if section and isinstance(field["default"], dict) else _value(field)
        )
        yield f"| `{path}` | {_type(field)} | {default} | {_cell(text)} |"
    yield ""
    for path, section_schema in inner:
        yield from _section(path, section_schema, definitions, described)


def _reference(field: dict[str, Any]) -> str | None:
    """Return the section a key holds (or null), or the section of its list's items."""
    place = field.get("items", field)
    parts = (*place.get("allOf", ()), *place.get("anyOf", ()))
    reference = place.get("$ref") or next((part["$ref"] for part in parts if "$ref" in part), None)
    return reference.rpartition("/")[2] if reference else None


def _type(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        kinds = [_type(part) for part in field["anyOf"]]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in field or "const" in field:
        return ", ".join(f"`{_written(value)}`" for value in field.get("enum", [field.get("const")]))
    if "prefixItems" in field:
        return f"({', '.join(_type(part) for part in field['prefixItems'])})"
    if field.get("type") == "array":
        return "list of sections" if _reference(field) else f"list of {_type(field['items'])}"
    if _reference(field):
        return "section"
    kind = {"string": "text", "integer": "integer", "boolean": "true or false", "object": "mapping"}.get(
        field.get("type", ""), field.get("type", "any")
    )
    limits = [
        text.format(f"{field[key]:g}") for key, text in LIMITS.items() if key in field and abs(field[key]) < 2**53
    ]
    return " ".join([kind, ", ".join(limits)]).strip()


def _value(field: dict[str, Any]) -> str:
    return f"`{_written(field['default'])}`" if field.get("default") != "" else "empty"


def _written(value: object) -> str:
    """Write a value as in YAML."""
    if isinstance(value, float):
        return f"{value:g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}".replace("e-0", "e-")
    text: str = yaml.safe_dump(value, default_flow_style=True).strip()
    return text.removesuffix("...").strip().strip("'")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def main() -> int:
    """Write the pages, or check them; return the exit code."""
    check = "--check" in sys.argv[1:]
    stale = {page: text for page, text in pages().items() if page.read_text(encoding="utf-8") != text}
    for page, text in stale.items():
        if not check:
            page.write_text(text, encoding="utf-8")
        sys.stdout.write(f"{page.relative_to(ROOT)} {'is out of date: run `make docs`' if check else 'written'}\n")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
