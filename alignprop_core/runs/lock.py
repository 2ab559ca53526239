"""The lock of a run folder: one process at a time may write to it."""

from __future__ import annotations

import os
from pathlib import Path

from filelock import FileLock, Timeout

from alignprop_core._files import cannot_write
from alignprop_core.errors import OutputError

LOCK_NAMES = (".lock", ".lock.pid")


class FolderLock:
    """Locks `folder/.lock`; `.lock.pid` names the process. The system releases the lock when its process ends.

    Raises:
        OutputError: another process, or another part of this one, has the lock; or the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        file, self._owner = (folder.resolve() / name for name in LOCK_NAMES)
        self._lock = FileLock(file, thread_local=False)
        try:
            self._lock.acquire(blocking=False)
            self._owner.write_text(f"{os.getpid()}\n")
        except Timeout as error:
            raise OutputError(
                f"{folder} is in use by another run (process {self._process()}). Wait until it has ended, or choose "
                "another output=."
            ) from error
        except OSError as error:
            raise cannot_write(file, error) from error

    def _process(self) -> str:
        try:
            process = self._owner.read_text().strip()
        except FileNotFoundError:  # between the other process's lock and its name
            return "unknown"
        return f"{process} (this one)" if process == str(os.getpid()) else process

    def release(self) -> None:
        """Release the lock; calling it again does nothing."""
        if self._lock.is_locked:
            self._owner.unlink(missing_ok=True)
            self._lock.release()
