"""The run folder: its names, whole-or-absent writes, one writer at a time. No torch.

config.yaml  environment.json  metrics.jsonl  evaluation.json  report.html  lora/  checkpoints/  images/
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from alignprop_core._files import cannot_write, check_space, flush, says_full, write_atomic, write_json
from alignprop_core.runs.lock import FolderLock, LOCK_NAME
from alignprop_core.errors import AlignpropError, OutputError, under
from alignprop_core.runs.metrics import Metrics

FILES = ("config.yaml", "environment.json", "metrics.jsonl", "evaluation.json", "report.html")
FOLDERS = ("lora", "checkpoints", "images")


class RunFolder:
    """One run's folder. Make it with `create` or `open`; as a context manager it lets go of the lock at the end."""

    def __init__(self, path: Path, lock: FolderLock | None) -> None:
        self.path = path
        self._lock = lock
        self._metrics = Metrics(self.metrics)

    @classmethod
    def create(cls, path: str | Path, *, overwrite: bool = False) -> RunFolder:
        """Make a new run folder and lock it.

        Args:
            path: the folder; it may exist if it is empty, or if a run failed in it before its first step. Missing
                parents are made.
            overwrite: clear away an earlier run's files (the names above, and nothing else) first.

        Raises:
            OutputError: the folder holds something, another process uses it, or it cannot be written to.
        """
        path = Path(path).expanduser().absolute()
        cls.check_free(path, overwrite=overwrite)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(path)
            try:
                with under("output"):
                    _refuse_used(path, overwrite)  # another run may have finished in it meanwhile
                for name in (*FILES, *FOLDERS):
                    _remove(path / name)
                _clear_leftovers(path)
            except BaseException:
                lock.release()
                raise
        except OSError as error:
            raise cannot_write(path, error) from error
        return cls(path, lock)

    @staticmethod
    def check_free(path: str | Path, *, overwrite: bool = False) -> None:
        """Raise OutputError where `create` would refuse; makes nothing (for a dry run, or before a model loads)."""
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
        """Open an existing run folder, to go on with it or (`lock=False`) to read it beside a running process.

        Raises:
            OutputError: there is no run, or another process is writing to it.
        """
        path = Path(path).expanduser().absolute()
        if not (path / "config.yaml").is_file():
            raise OutputError(f"{path} is no run folder: there is no config.yaml in it. Check the path.")
        held = FolderLock(path) if lock else None
        if held:
            _clear_leftovers(path)
        return cls(path, held)

    def close(self) -> None:
        """Close the metrics and let go of the lock. What is written stays."""
        self._metrics.close()
        if self._lock:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- names

    @property
    def config(self) -> Path:
        """The resolved, complete run config."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, device and licences: what `environment()` gave."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """A JSON object a line, a line a step."""
        return self.path / "metrics.jsonl"

    @property
    def evaluation(self) -> Path:
        """Base against tuned on held-out prompts."""
        return self.path / "evaluation.json"

    @property
    def report(self) -> Path:
        """The report, one page that opens offline."""
        return self.path / "report.html"

    @property
    def lora(self) -> Path:
        """Adapters, final and along the way."""
        return self.path / "lora"

    @property
    def checkpoints(self) -> Path:
        """Complete states to resume from."""
        return self.path / "checkpoints"

    @property
    def images(self) -> Path:
        """Samples along the way."""
        return self.path / "images"

    def inside(self, *parts: str | Path) -> Path:
        """The path of something in this folder, its own folder made.

        Raises:
            OutputError: it would lie outside (`..`, an absolute path, a link that leads away).
        """
        target = self.path.joinpath(*parts)
        root = self.path.resolve()
        if not target.resolve().is_relative_to(root) or target.resolve() == root:
            raise OutputError(f"{Path(*parts)} would lie outside the run folder {self.path}. Use a plain name.")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(target, error) from error
        return target

    # --- writing

    def write_bytes(self, name: str | Path, data: bytes) -> Path:
        """Write a file whole or not at all; `name` is relative to the folder. OutputError where it cannot be."""
        target = self.inside(name)
        write_atomic(target, data)
        return target

    def write_text(self, name: str | Path, text: str) -> Path:
        """As `write_bytes`, in UTF-8."""
        return self.write_bytes(name, text.encode("utf-8"))

    def write_json(self, name: str | Path, data: Any) -> Path:
        """As `write_text`; NaN and infinities, which JSON has not, are written as null."""
        return write_json(self.inside(name), data)

    @contextmanager
    def staged(self, name: str | Path, *, needs: int = 0) -> Iterator[Path]:
        """A new folder to fill, which takes its name only when the block ends without an error.

        `needs` bytes must be free before it starts. An older folder of that name stays until the new one is whole.

        Raises:
            OutputError: the disk is full or cannot be written to; nothing new is left behind then.
        """
        target = self.inside(name)
        check_space(target.parent, needs)
        building = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        replaced = target.with_name(f".{target.name}.{os.getpid()}.old.tmp")
        try:
            try:
                _remove(building)
                building.mkdir()
            except OSError as error:
                raise cannot_write(target, error) from error
            try:
                yield building
            except AlignpropError:
                raise
            except Exception as error:
                if says_full(error, target.parent):
                    raise cannot_write(target, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from error
                raise
            try:
                for file in sorted(building.rglob("*")):
                    if file.is_file():
                        flush(file)
                if target.exists():
                    os.replace(target, replaced)
                os.replace(building, target)
                flush(target.parent)
            except OSError as error:
                raise cannot_write(target, error) from error
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
        """Add one line to metrics.jsonl, on disk for readers when this returns; as `Metrics.append`."""
        self._metrics.append(row)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines of metrics.jsonl; as `Metrics.read`."""
        return self._metrics.read()

    def truncate_metrics(self, step: int) -> None:
        """Keep the lines up to and including `step`: what a run does before it goes on from a checkpoint at `step`."""
        self._metrics.truncate(step)


def _never_began(path: Path, names: Sequence[str]) -> bool:
    """Whether a run failed here before its first step: there is nothing to lose and nothing to resume."""
    empty = [name for name in names if (path / name).is_dir() and not any((path / name).iterdir())]
    rest = set(names) - set(empty) - {"config.yaml", "environment.json", "images"}
    begun = rest == {"metrics.jsonl"} and (path / "metrics.jsonl").stat().st_size > 0
    return {"config.yaml", "environment.json"} <= set(names) and not (rest - {"metrics.jsonl"}) and not begun


def _refuse_used(path: Path, overwrite: bool) -> None:
    names = sorted(p.name for p in path.iterdir() if p.name != LOCK_NAME and not _is_leftover(p))
    if not names or _never_began(path, names):
        return
    if not overwrite:
        raise OutputError(
            f"{path} exists already and is not empty (it holds {', '.join(names[:3])}). "
            "Choose another output=, or go on with that run: --resume latest."
        )
    if "config.yaml" not in names:
        raise OutputError(f"{path} holds something that is no run; it is not overwritten. Choose another output=.")


def _is_leftover(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _clear_leftovers(path: Path) -> None:
    """Remove what a killed process was writing. Only its next owner, who holds the lock, may."""
    for folder in (path, *(path / name for name in FOLDERS)):
        if folder.is_dir():
            for item in folder.iterdir():
                if _is_leftover(item):
                    _remove(item)


def _remove(path: Path) -> None:
    """Remove a file or a folder; a folder loses its name first, so that half of one is never seen under it."""
    try:
        if path.is_dir() and not path.is_symlink():
            going = path if _is_leftover(path) else path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
            os.replace(path, going)
            shutil.rmtree(going)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def _last_number(name: str) -> int:
    numbers = re.findall(r"\d+", name)
    return int(numbers[-1]) if numbers else -1
