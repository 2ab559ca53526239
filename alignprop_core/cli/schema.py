"""`alignprop schema`: JSON Schema of the run config."""

from __future__ import annotations

import typer

from alignprop_core.cli import common


def schema(
    json: bool = typer.Option(True, "--json", help="The output is always JSON.", hidden=True),
) -> None:
    """Print the JSON Schema of a run config, including the options of the installed rewards.

    Editors use it to complete and validate run configs: save it to a file and make
    `# yaml-language-server: $schema=FILE` the first line of a config.
    """
    from alignprop_core.config.schema import json_schema
    from alignprop_core.registry.registry import default_registry

    registry = default_registry()
    common.print_json(json_schema(registry))
    common.note_broken_plugins(registry)
