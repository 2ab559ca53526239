"""The progress bar of everything that takes longer than two seconds."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from alignprop_core.training.callback import StepRecord


def progress_bar(console: Console | None = None) -> Progress:
    """Return a progress bar with a text field, count, elapsed and remaining time; silent in pipes."""
    console = console or Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=console,
        disable=not console.is_terminal,
    )


def terms_line(record: StepRecord) -> str:
    """Return a step's terms for one line: scores, and for several terms shares and the worst conflict.

    `clip_score 0.27 61%  jpeg -5.3 39%  cos -0.12`: raw scores, parts of the direction, lowest cosine of two gradients.
    """
    parts = []
    for label, values in record.terms.items():
        share = values.get("share") if len(record.terms) > 1 else None
        parts.append(f"{label} {values['raw']:.4g}" + ("" if share is None else f" {round(100 * share)}%"))
    known = [value for value in record.cosines.values() if value is not None]
    if known:
        parts.append(f"cos {min(known):.2f}")
    if record.idle:
        parts.append(f"nothing done: {record.idle}")
    return "  ".join(parts)
