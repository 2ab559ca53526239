"""`alignprop doctor`: what this machine has, and the traps that cost people time."""

from __future__ import annotations

import typer

from alignprop_core.cli import common

_STYLES = {"ok": "green", "warning": "yellow", "error": "red"}


def doctor(
    json: bool = common.JSON_OPTION,
    quick: bool = typer.Option(False, "--quick", help="Do not import torch, hence do not look at accelerators."),
) -> None:
    """Check the installation: versions, accelerators, plugins, disk, hub settings, common traps.

    Exit code 1 if something is wrong that would stop a run.
    """
    from alignprop_core.cli.checks import check_all
    from alignprop_core.registry.registry import default_registry

    findings = check_all(default_registry(), quick=quick)
    if json:
        common.print_json([finding.as_json() for finding in findings])
    else:
        rows = [
            [f.what, common.styled(f.status, _STYLES[f.status]), f.found + (f"\n{f.advice}" if f.advice else "")]
            for f in findings
        ]
        common.print_table(["what", "status", "found"], rows)
    if any(finding.status == "error" for finding in findings):
        raise typer.Exit(1)
