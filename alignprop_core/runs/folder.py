"""The run folder: file names, atomic writes and the lock. Imports no torch."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from alignprop_core._files import cannot_write, check_space, disk_is_full, flush, write_atomic, write_json, writing
from alignprop_core.errors import AlignpropError, OutputError, under
from alignprop_core.runs.lock import LOCK_NAMES, FolderLock
from alignprop_core.runs.metrics import append_row, read_rows, truncate_rows

FILES = ("config.yaml", "environment.json", "metrics.jsonl", "evaluation.json", "report.html")
FOLDERS = ("lora", "checkpoints", "images")


class RunFolder:
    """The folder of one run. Use `create` or `open`; as a context manager it releases the lock at the end."""

    def __init__(self, path: Path, lock: FolderLock | None) -> None:
        self.path = path
        self._lock = lock
        self._metrics = path / "metrics.jsonl"
        self.lora = path / "lora"

    @classmethod
    def create(cls, path: str | Path, *, overwrite: bool = False) -> RunFolder:
        """Create a run folder and lock it.

        Args:
            path: the folder; it may exist if it is empty, or if a run failed in it before its first step. Missing
                parents are created.
            overwrite: first remove an earlier run's files (`FILES` and `FOLDERS`, nothing else).

        Raises:
            OutputError: the folder is not empty, in use, or cannot be written to.
        """
        path = Path(path).expanduser().absolute()
        cls.check_free(path, overwrite=overwrite)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(path)
            try:
                with under("output"):
                    _refuse_used(path, overwrite)  # another run may have finished in it since
                for name in (*FILES, *FOLDERS):
                    _remove(path / name)
                _clear_leftovers(path)
            except BaseException:
                lock.release()
                raise
        return cls(path, lock)

    @staticmethod
    def check_free(path: str | Path, *, overwrite: bool = False) -> None:
        """Raise OutputError where `create` would refuse; creates nothing (for a dry run, or before a model loads)."""
        path = Path(path).expanduser().absolute()
        nearest = next(parent for parent in (path, *path.parents) if parent.exists())
        with under("output"):
            if not nearest.is_dir():
                raise OutputError(f"{nearest} is a file, and a folder is needed. Choose another output=.")
            if not os.access(nearest, os.W_OK | os.X_OK):
                raise cannot_write(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
            if nearest == path:
                _refuse_used(path, overwrite)

    @classmethod
    def open(cls, path: str | Path, *, lock: bool = True) -> RunFolder:
        """Open an existing run folder to resume it, or (`lock=False`) to read it while another process writes.

        Raises:
            OutputError: there is no run in it, or another process is writing to it.
        """
        path = Path(path).expanduser().absolute()
        if not (path / "config.yaml").is_file():
            raise OutputError(f"{path} is not a run folder: it has no config.yaml. Check the path.")
        held = FolderLock(path) if lock else None
        if held:
            _clear_leftovers(path)
        return cls(path, held)

    def close(self) -> None:
        """Release the lock."""
        if self._lock:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def inside(self, *parts: str | Path) -> Path:
        """Return the path of a file in this folder; missing parents are created.

        Raises:
            OutputError: it would be outside (`..`, an absolute path, a link to another place).
        """
        target = self.path.joinpath(*parts)
        root = self.path.resolve()
        if not target.resolve().is_relative_to(root) or target.resolve() == root:
            raise OutputError(f"{Path(*parts)} would be outside the run folder {self.path}. Use a plain name.")
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        return target

    # --- writing

    def write_text(self, name: str | Path, text: str) -> None:
        """Write text as UTF-8, atomically; `name` is relative to the folder. `OutputError` if it cannot be written."""
        write_atomic(self.inside(name), text.encode("utf-8"))

    def write_json(self, name: str | Path, data: Any) -> Path:
        """Write JSON, as `write_text`; NaN and infinities, which JSON does not have, become null."""
        return write_json(self.inside(name), data)

    @contextmanager
    def staged(self, name: str | Path, *, needs: int = 0) -> Iterator[Path]:
        """Yield a new folder to fill, which gets its name when the block ends without an error.

        `needs` bytes must be free before it starts. An older folder of that name stays until the new one is complete.

        Raises:
            OutputError: the disk is full or cannot be written to; nothing new is kept then.
        """
        target = self.inside(name)
        check_space(target.parent, needs)
        building = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        replaced = target.with_name(f".{target.name}.{os.getpid()}.old.tmp")
        try:
            with writing(target):
                _remove(building)
                building.mkdir()
            try:
                yield building
            except AlignpropError:
                raise
            except Exception as error:
                if disk_is_full(error, target.parent):
                    raise cannot_write(target, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from error
                raise
            with writing(target):
                for file in sorted(building.rglob("*")):
                    if file.is_file():
                        flush(file)
                if target.exists():
                    os.replace(target, replaced)
                os.replace(building, target)
                flush(target.parent)
        finally:
            shutil.rmtree(building, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)

    def keep_newest(self, pattern: str, n: int) -> list[Path]:
        """Remove all but the `n` newest files or folders matching `pattern` ("checkpoints/step-*"); return the removed.

        Newest is the highest last number in the name; names without one count as the oldest.
        """
        if n < 1:
            raise OutputError(f"save.keep is {n}: at least 1 must be kept.")
        self.inside(pattern)  # refuses patterns that lead outside
        found = [p for p in self.path.glob(pattern) if not p.name.startswith(".")]
        found.sort(key=lambda p: (_last_number(p.name), p.name))
        for old in found[:-n]:
            _remove(old)
        return found[:-n]

    # --- metrics

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; see `append_row`."""
        append_row(self._metrics, row)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return all complete lines of metrics.jsonl; see `read_rows`."""
        return read_rows(self._metrics)

    def truncate_metrics(self, step: int) -> None:
        """Keep the lines up to and including `step`, to resume from a checkpoint at `step`."""
        truncate_rows(self._metrics, step)


def _never_began(path: Path, names: Sequence[str]) -> bool:
    """Return whether a run failed here before its first step: there is nothing to lose and nothing to resume."""
    empty = [name for name in names if (path / name).is_dir() and not any((path / name).iterdir())]
    rest = set(names) - set(empty) - {"config.yaml", "environment.json", "images"}
    begun = rest == {"metrics.jsonl"} and (path / "metrics.jsonl").stat().st_size > 0
    return {"config.yaml", "environment.json"} <= set(names) and not (rest - {"metrics.jsonl"}) and not begun


def _refuse_used(path: Path, overwrite: bool) -> None:
    names = sorted(p.name for p in path.iterdir() if p.name not in LOCK_NAMES and not _is_leftover(p))
    if not names or _never_began(path, names):
        return
    if not overwrite:
        raise OutputError(
            f"{path} exists already and is not empty (it contains {', '.join(names[:3])}). "
            "Choose another output, resume that run (--resume latest; in Python resume=), or replace it (--overwrite; "
            "overwrite=True)."
        )
    if "config.yaml" not in names:
        raise OutputError(f"{path} contains something other than a run and is not overwritten. Choose another output=.")


def _is_leftover(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _clear_leftovers(path: Path) -> None:
    """Remove what a killed process was writing; call it with the lock."""
    for folder in (path, *(path / name for name in FOLDERS)):
        if folder.is_dir():
            for item in folder.iterdir():
                if _is_leftover(item):
                    _remove(item)


def _remove(path: Path) -> None:
    """Remove a file or a folder; a folder is renamed first, so that no incomplete folder has its name."""
    with writing(path):
        if path.is_dir() and not path.is_symlink():
            going = path if _is_leftover(path) else path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
            os.replace(path, going)
            shutil.rmtree(going)
        else:
            path.unlink(missing_ok=True)


def _last_number(name: str) -> int:
    numbers = re.findall(r"\d+", name)
    return int(numbers[-1]) if numbers else -1
