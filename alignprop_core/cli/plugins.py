"""`alignprop plugins`: list the installed plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import typer

from alignprop_core.cli import common
from alignprop_core.cli.extensions import problems

if TYPE_CHECKING:
    from typer.core import TyperGroup

    from alignprop_core.registry.discovery import PluginRecord

_KINDS = ("rewards", "models", "families", "prompts", "weights", "callbacks", "commands", "loaders")


def plugins(
    context: typer.Context,
    json: bool = common.JSON_OPTION,
    traceback: bool = typer.Option(False, "--traceback", help="Also print the tracebacks of failed plugins."),
    requirements: bool = typer.Option(False, "--requirements", help="Print pinned versions for a requirements file."),
) -> None:
    """List the installed plugins: version, status, what they provide, and errors."""
    from alignprop_core import __version__
    from alignprop_core.registry.registry import default_registry
    from alignprop_core.specs import API_VERSION

    registry = default_registry()
    if requirements:
        pinned = {record.distribution: record.version for record in registry.plugins}
        for name, version in sorted({"alignprop-core": __version__, **pinned}.items()):
            typer.echo(f"{name}=={version}")
    elif json:
        listed = [_as_json(record) for record in registry.plugins]
        common.print_json({"core": __version__, "api_version": API_VERSION, "plugins": listed})
    elif not registry.plugins:
        typer.echo("No plugins are installed. Rewards and models are plugins: pip install alignprop-starter")
    else:
        _print(registry.plugins, traceback)
        for problem in problems(registry, cast("TyperGroup", context.find_root().command)):
            common.note(f"error: {problem}")


def _print(records: tuple[PluginRecord, ...], traceback: bool) -> None:
    rows = []
    for record in records:
        offers = [f"{kind}: {', '.join(names)}" for kind in _KINDS if (names := record.names(kind))]
        remarks = [*([record.error] if record.error else []), *record.warnings]
        rows.append([record.distribution, record.version, record.status, "\n".join([*offers, *remarks])])
    common.print_table(["plugin", "version", "status", "offers, errors"], rows)
    failed = [record for record in records if record.traceback]
    for record in failed if traceback else ():
        typer.echo(f"{record.name}\n{record.traceback}")
    if failed and not traceback:
        common.note("`alignprop plugins --traceback` prints the tracebacks of the failed plugins.")


def _as_json(record: PluginRecord) -> dict[str, Any]:
    keys = ("distribution", "version", "entry_point", "license", "status", "error", "warnings", "traceback")
    facts = {key: getattr(record, key) for key in keys}
    return facts | {"import_seconds": round(record.seconds, 4)} | {kind: record.names(kind) for kind in _KINDS}
