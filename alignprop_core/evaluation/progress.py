"""The progress bar of commands that take longer than two seconds."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


class StatusBelow(Progress):
    """Bars, with the tasks' statuses below: beside them, they would push the bars out of a narrow terminal."""

    def get_renderables(self) -> Iterator[RenderableType]:
        """Yield the bars, then the statuses."""
        yield self.make_tasks_table(self.tasks)
        yield from (Text(status) for task in self.tasks if (status := task.fields.get("status")))


def progress_bar(console: Console | None = None) -> Progress:
    """Return a progress bar with count, elapsed and remaining time and a status text below; silent in pipes."""
    console = console or Console(stderr=True)
    return StatusBelow(
        TextColumn("{task.description}"),
        BarColumn(30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
