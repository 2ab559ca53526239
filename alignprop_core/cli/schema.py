"""`alignprop schema`: the run config as a JSON Schema, for editors and checks."""

from __future__ import annotations

import typer

from alignprop_core.cli import common


def schema(
    json: bool = typer.Option(True, "--json", help="The schema is JSON in any case.", hidden=True),
) -> None:
    """Print the JSON Schema of a run config, the installed rewards' options included.

    Editors complete and check run configs with it: write it to a file, and put
    `# yaml-language-server: $schema=FILE` on a config's first line.
    """
    from alignprop_core.config.schema import json_schema
    from alignprop_core.registry.registry import default_registry

    registry = default_registry()
    common.print_json(json_schema(registry))
    common.note_broken_plugins(registry)
