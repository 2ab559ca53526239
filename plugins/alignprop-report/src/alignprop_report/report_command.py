"""`alignprop report`: one HTML page of a run, or of several side by side."""

from __future__ import annotations

from pathlib import Path

import typer

from alignprop_core.cli import common


def report(
    runs: list[Path] = typer.Argument(metavar="RUN", help="A run folder; with several, one page compares them."),
    output: Path | None = typer.Option(
        None,
        help="File to write; the default is report.html in the run folder, or in the current folder for several runs.",
    ),
) -> None:
    """Write report.html: results, curves and images on one page that opens offline."""
    from alignprop_core.errors import UserError
    from alignprop_report.comparison_page import several_page
    from alignprop_report.run_files import read_run
    from alignprop_report.run_page import run_page, write_page

    paths = [run.expanduser().resolve() for run in runs]
    twice = next((run for place, run in enumerate(runs) if paths[place] in paths[:place]), None)
    if twice is not None:
        raise UserError(f"{twice} is given twice. Give each run once.")
    read = [read_run(run) for run in runs]
    if output is None:
        output = Path("report.html") if len(read) > 1 else read[0].path / "report.html"
    write_page(output, several_page(read) if len(read) > 1 else run_page(read[0]))
    common.print_facts([("report", str(output))])
