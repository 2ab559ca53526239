"""A run's metrics: a JSON object a line, each whole or absent, for readers while the run goes on. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from alignprop_core._files import cannot_write, plain, write_atomic
from alignprop_core.errors import OutputError

STOPPED = "stopped"
"""Key of the line that says why a run stopped before its last step: {"step": ..., "stopped": ...}, the last line."""


class Metrics:
    """The file metrics.jsonl of a run.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl, on disk for readers when this returns. A half line before it is cut off.

        Raises:
            OutputError: the disk is full; the lines before stay whole.
        """
        line = json.dumps(plain(row), ensure_ascii=False).encode("utf-8") + b"\n"
        try:
            if self._file is None:
                _cut_half_line(self.path)
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
            start = self._file.seek(0, os.SEEK_END)
            written = 0
            try:
                while written < len(line):
                    written += self._file.write(line[written:])
            except OSError:
                self._file.truncate(start)
                raise
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def read(self) -> list[dict[str, Any]]:
        """All whole lines of metrics.jsonl; a half-written last line is passed over.

        Raises:
            OutputError: a line before the last is damaged.
        """
        if not self.path.exists():
            return []
        rows: list[dict[str, Any]] = []
        lines = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is nothing, or half a line
            try:
                row = json.loads(line)
            except ValueError as error:
                raise OutputError(f"{self.path}, line {number}, is damaged ({error}). Remove that line.") from error
            rows.append(row)
        return rows

    def truncate(self, step: int) -> None:
        """Keep the lines up to and including `step`: what a run does before it goes on from a checkpoint at `step`.

        A line that says why it stopped goes too: whether it stops again is up to its guards.
        """
        if not self.path.exists():
            return
        kept = [row for row in self.read() if row.get("step", 0) <= step and STOPPED not in row]
        self.close()
        write_atomic(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))

    def close(self) -> None:
        """Close the file; what is written stays, and a further line opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _cut_half_line(file: Path) -> None:
    if not file.exists():
        return
    with open(file, "rb+") as opened:
        content = opened.read()
        opened.truncate(content.rfind(b"\n") + 1)
