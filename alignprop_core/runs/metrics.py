"""A run's metrics.jsonl: one JSON object per line, readable while the run continues. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from alignprop_core._files import plain, write_atomic, writing
from alignprop_core.errors import OutputError

STOPPED = "stopped"
"""Key of the last line of a run that stopped early: {"step": ..., "stopped": REASON}."""


class Metrics:
    """The file metrics.jsonl of a run.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one line, visible to readers when this returns. An incomplete line before it is removed.

        Raises:
            OutputError: the disk is full; the lines before stay complete.
        """
        line = json.dumps(plain(row), ensure_ascii=False).encode("utf-8") + b"\n"
        with writing(self.path):
            if self._file is None:
                _remove_incomplete_line(self.path)
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
            start = self._file.seek(0, os.SEEK_END)
            written = 0
            try:
                while written < len(line):
                    written += self._file.write(line[written:])
            except OSError:
                self._file.truncate(start)
                raise

    def read(self) -> list[dict[str, Any]]:
        """Return all complete lines; an incomplete last line is ignored.

        Raises:
            OutputError: a line before the last is damaged.
        """
        if not self.path.exists():
            return []
        rows: list[dict[str, Any]] = []
        # After the last newline there is nothing, or an incomplete line.
        for number, line in enumerate(self.path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise OutputError(f"{self.path}, line {number}, is damaged ({error}). Remove that line.") from error
        return rows

    def truncate(self, step: int) -> None:
        """Keep the lines up to and including `step`, to resume from a checkpoint at `step`.

        The line with the reason for an early stop is removed too: the resumed run decides anew.
        """
        if not self.path.exists():
            return
        kept = [row for row in self.read() if row.get("step", 0) <= step and STOPPED not in row]
        self.close()
        write_atomic(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))

    def close(self) -> None:
        """Close the file; a further line opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _remove_incomplete_line(file: Path) -> None:
    if not file.exists():
        return
    with open(file, "rb+") as opened:
        content = opened.read()
        opened.truncate(content.rfind(b"\n") + 1)
