"""`alignprop doctor`: check the installation and the machine."""

from __future__ import annotations

from dataclasses import asdict

import typer

from alignprop_core.cli import common


def doctor(
    json: bool = common.JSON_OPTION,
    quick: bool = typer.Option(False, "--quick", help="Skip the check of accelerators, which imports torch."),
) -> None:
    """Check the installation: versions, accelerators, plugins, disk space, hub settings and threads.

    The exit code is 1 if there is an error that would stop a run.
    """
    from alignprop_core.cli.checks import check_all
    from alignprop_core.registry.registry import default_registry

    findings = check_all(default_registry(), quick=quick)
    if json:
        common.print_json([asdict(finding) for finding in findings])
    else:
        rows = [[f.what, f.status, f"{f.found}\n{f.advice}".rstrip()] for f in findings]
        common.print_table(["check", "status", "result"], rows)
    if any(finding.status == "error" for finding in findings):
        raise typer.Exit(1)
