"""`alignprop report`: one HTML page of a run, or of several side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from alignprop_core.cli import common


def report(
    runs: list[Path] = typer.Argument(metavar="RUN...", help="A run folder; with several, one page compares them."),
    output: Path | None = typer.Option(
        None, help="File to write; left out, it is report.html in the run folder, or here for several runs."
    ),
) -> None:
    """Write report.html: results, curves and pictures on one page that opens offline."""
    from alignprop_core.errors import UserError
    from alignprop_core.evaluation.report.page import run_page, write_page
    from alignprop_core.evaluation.report.read import read_run
    from alignprop_core.evaluation.report.several import several_page

    paths = [run.expanduser().resolve() for run in runs]
    twice = next((run for place, run in enumerate(runs) if paths[place] in paths[:place]), None)
    if twice is not None:
        raise UserError(f"{twice} is given twice. Give each run once.")
    read = [read_run(run) for run in runs]
    if output is None:
        output = Path("report.html") if len(read) > 1 else read[0].path / "report.html"
    write_page(output, several_page(read) if len(read) > 1 else run_page(read[0]))
    common.print_facts([("report", str(output))])


def draw_again(folder: Path) -> None:
    """Bring a run's page up to date, where it has one."""
    from alignprop_core.evaluation.report.page import run_page, write_page
    from alignprop_core.evaluation.report.read import read_run

    page = folder / "report.html"
    if page.is_file() and (folder / "config.yaml").is_file():
        write_page(page, run_page(read_run(folder)))


def known_of(folder: Path) -> dict[str, Any]:
    """Which step's LoRA a run has, and why it stopped, as its evaluation says: a new one is of the same LoRA."""
    from alignprop_core.evaluation.report.read import read_run

    if not (folder / "config.yaml").is_file():
        return {}  # no run, but a folder that --output named
    known = read_run(folder).comparison or {}
    return {key: known[key] for key in ("step", "stopped") if key in known}
