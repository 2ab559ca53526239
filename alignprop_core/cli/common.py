"""What commands share: consoles, tables and JSON. Light at import; rich comes when something is drawn."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from alignprop_core.registry.registry import Registry

PIPE_COLUMNS = 120
JSON_OPTION = typer.Option(False, "--json", help="Print JSON instead of a table.")


def console(*, stderr: bool = False) -> Console:
    """Return a console on standard output (or standard error) that takes text literally, without markup."""
    from rich.console import Console

    console = Console(stderr=stderr, markup=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        # rich falls back to 80 columns in pipes and logs, which folds tables into ribbons.
        console.width = PIPE_COLUMNS
    return console


def print_json(data: object) -> None:
    """Print data as indented JSON on standard output."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a plain table; long cells wrap, nothing is cut off."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    # Names stay in one piece, unless they would push the other columns out.
    short = max((len(str(row[0])) for row in rows), default=0) <= console().width // 2
    for i, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=i == 0 and short)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    console().print(table)


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Print labelled facts below one another; long ones wrap beside their label."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in facts:
        grid.add_row(Text(label), Text(text))
    console().print(grid)


def styled(text: str, style: str) -> Any:
    """Return text in a colour, for a table's cell."""
    from rich.text import Text

    return Text(text, style=style)


def note(message: str) -> None:
    """Print a remark on standard error, where it does not mix with results."""
    print(message, file=sys.stderr)


def note_broken_plugins(registry: Registry) -> None:
    """Say on standard error which plugins are missing from a listing, and why."""
    for record in registry.plugins:
        if record.status in ("failed", "incompatible"):
            note(f"note: {record.distribution} is not loaded ({record.status}: {record.error})")


def status(message: str) -> Any:
    """Return a context that shows what is being waited for, on standard error; silent in pipes."""
    out = console(stderr=True)
    return out.status(message) if out.is_terminal else nullcontext()


def quiet_libraries() -> None:
    """Keep the progress bars and advice of other libraries out of the terminal; call before they are imported."""
    for name, value in (
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("DIFFUSERS_VERBOSITY", "error"),
        ("TOKENIZERS_PARALLELISM", "false"),
    ):
        os.environ.setdefault(name, value)
