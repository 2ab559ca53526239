"""SHA-256 checksums of files, computed once per content, and which weights files rewards read. Imports no torch."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from threading import Lock

from alignprop_core._files import read_table, write_json
from alignprop_core.errors import OutputError

LARGE = 2**22
"""Checksums of files of at least this many bytes are remembered from one process to the next."""

READ: list[Path] = []
"""The weights files that this process has looked up or read, in order."""

_lock = Lock()


def checksum(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal digits.

    It is computed again only if the file's size or times have changed: for weights of gigabytes it takes seconds.
    """
    status = path.stat()
    with _lock:  # another thread may be computing it
        # A copy that keeps the time of modification still has its own time of change.
        return _checksum(path.resolve(), (status.st_size, status.st_mtime_ns, status.st_ctime_ns))


@lru_cache(maxsize=4096)
def _checksum(path: Path, mark: tuple[int, ...]) -> str:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignprop" / "checksums.json"
    known = read_table(cache) if mark[0] >= LARGE else {}
    found, *then = known.get(str(path), [None])
    if found is None or then != list(mark):
        with open(path, "rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if mark[0] >= LARGE:
            with suppress(OSError, OutputError):
                cache.parent.mkdir(parents=True, exist_ok=True)
                write_json(cache, known | {str(path): [found, *mark]})
    return str(found)
