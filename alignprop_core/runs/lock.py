"""One process at a time in a folder: a lock the system drops when its owner dies. No torch."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path

from alignprop_core._files import cannot_write
from alignprop_core.errors import OutputError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK_NAME = ".lock"
_TAKEN = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # some network file systems: go on without
_held: set[Path] = set()  # a record lock does not keep its own process out, so that is kept here


class FolderLock:
    """Holds `folder/.lock`, which names its process. However the owner died, the next one takes it over.

    Raises:
        OutputError: another process, or another part of this one, holds it; or the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder.resolve() / LOCK_NAME
        if self.file in _held:
            raise _in_use(folder, f"{os.getpid()} (this one)")
        try:
            self._descriptor = self._take(folder)
        except OSError as error:
            raise cannot_write(self.file, error) from error
        self._owner = os.getpid()
        _held.add(self.file)

    def _take(self, folder: Path) -> int:
        while True:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if not _try_lock(descriptor):
                    os.lseek(descriptor, 0, os.SEEK_SET)
                    raise _in_use(folder, os.read(descriptor, 20).decode("ascii", "replace").strip() or "unknown")
                if _names(descriptor, self.file):  # else its last owner removed it between our open and our lock
                    os.ftruncate(descriptor, 0)
                    os.lseek(descriptor, 0, os.SEEK_SET)
                    os.write(descriptor, f"{os.getpid()}\n".encode())
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def release(self) -> None:
        """Let go; doing it twice, or in a forked child, does nothing."""
        if self.file in _held and self._owner == os.getpid():
            _held.discard(self.file)
            with suppress(OSError):
                self.file.unlink()
            os.close(self._descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, 1024, os.SEEK_SET)  # beyond the process id, which others read
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        if error.errno not in _UNSUPPORTED:
            raise
    return True


def _names(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def _in_use(folder: Path, owner: str) -> OutputError:
    return OutputError(
        f"{folder} is in use by another run (process {owner}). Wait until it has ended, or choose another output=."
    )
