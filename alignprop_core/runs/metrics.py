"""A run's metrics.jsonl: one JSON object per line, readable while the run continues. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from alignprop_core._files import plain, write_atomic, writing
from alignprop_core.errors import OutputError

STOPPED = "stopped"
"""Key of the last line of a run that stopped early: {"step": ..., "stopped": REASON}."""


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one line, visible to readers when this returns. An incomplete line before it is removed.

    Raises:
        OutputError: the disk is full; the lines before stay complete.
    """
    line = json.dumps(plain(row), ensure_ascii=False).encode("utf-8") + b"\n"
    with writing(path), open(path, "ab+", buffering=0) as file:
        start = _end_of_lines(file)
        file.truncate(start)
        written = 0
        try:
            while written < len(line):
                written += file.write(line[written:])
        except OSError:
            file.truncate(start)
            raise


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return all complete lines; an incomplete last line is ignored. Empty if there is no such file.

    Raises:
        OutputError: a line before the last is damaged.
    """
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    # After the last newline there is nothing, or an incomplete line.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise OutputError(f"{path}, line {number}, is damaged ({error}). Remove that line.") from error
    return rows


def truncate_rows(path: Path, step: int) -> None:
    """Keep the lines up to and including `step`, to resume from a checkpoint at `step`.

    The line with the reason for an early stop is removed too: the resumed run decides anew.
    """
    if path.exists():
        kept = [row for row in read_rows(path) if row.get("step", 0) <= step and STOPPED not in row]
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


def _end_of_lines(file: FileIO) -> int:
    """Return where the last complete line ends; a killed process may have left an incomplete one after it."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(end - 1, 0))
    if file.read(1) not in (b"", b"\n"):
        file.seek(0)
        end = file.read().rfind(b"\n") + 1
    return end
