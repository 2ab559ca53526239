"""Options, tables and JSON output shared by the commands. rich is imported on first use."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import typer

from alignprop_core.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from alignprop_core.registry.registry import Registry

PIPE_COLUMNS = 120
STYLES = {
    "loaded": "green", "ok": "green", "passed": "green",
    "blocked": "yellow", "not allowed": "yellow", "skipped": "yellow", "warning": "yellow",
    "error": "red", "failed": "red", "incompatible": "red",
    "not applicable": "dim",
}  # fmt: skip
"""Colors of the cells that are a status."""
MODELS = "a registered model, a hub id, a diffusers folder or a .safetensors file"
MAX_SEED = 2**63 - 1
JSON_OPTION = typer.Option(False, "--json", help="Print JSON instead of a table.")
DEVICE_OPTION = typer.Option("auto", help="auto, cpu, cuda, cuda:N or mps.")
REWARD_OPTIONS = typer.Option(
    [], "--option", "-o", metavar="[NAME.]KEY=VALUE", help="Option of a reward; NAME is needed with several rewards."
)


def console(*, stderr: bool = False) -> Console:
    """Return a console on standard output or standard error, without markup."""
    from rich.console import Console

    console = Console(stderr=stderr, markup=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        # rich falls back to 80 columns in pipes and logs, which is too narrow for most tables.
        console.width = PIPE_COLUMNS
    return console


def print_json(data: object) -> None:
    """Print data as indented JSON on standard output."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table. Long cells wrap in a terminal; in pipes and logs, columns are as wide as their longest line."""
    cells = [[str(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        # Without rich, whose import takes as long as the rest of a listing's own work.
        split = [[cell.split("\n") for cell in row] for row in cells]
        lines = [columns, *(line for row in split for line in zip_longest(*row, fillvalue=""))]
        widths = [max(map(len, column)) for column in zip_longest(*lines, fillvalue="")]
        for line in ("", *lines):
            typer.echo("  ".join(map(str.ljust, line, widths)).rstrip())
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    # Names do not wrap unless they would take more than half of the width.
    short = max((len(row[0]) for row in cells), default=0) <= console().width // 2
    for i, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=i == 0 and short)
    for row in cells:
        table.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
    console().print(table)


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Print labels and values, one pair per line."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in facts:
        grid.add_row(Text(label), Text(text))
    console().print(grid)


def note(message: str) -> None:
    """Print a note on standard error, apart from the results."""
    print(message, file=sys.stderr)


def note_broken_plugins(registry: Registry) -> None:
    """Report on standard error which plugins are missing from a listing, and why."""
    for record in registry.plugins:
        if record.status in ("failed", "incompatible"):
            note(f"note: {record.distribution} is not loaded ({record.status}: {record.error})")


def status(message: str) -> Any:
    """Return a context that shows a spinner with a message on standard error; silent in pipes."""
    out = console(stderr=True)
    return out.status(message) if out.is_terminal else nullcontext()


def quiet_libraries() -> None:
    """Silence progress bars and advice of other libraries; call before they are imported."""
    for name, value in (
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("DIFFUSERS_VERBOSITY", "error"),
        ("TOKENIZERS_PARALLELISM", "false"),
    ):
        os.environ.setdefault(name, value)


def numbers(text: str, option: str) -> list[float]:
    """Return the comma-separated numbers of an option; `UserError` if there is anything else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: write numbers separated by commas, such as 0,0.5,1.") from None
