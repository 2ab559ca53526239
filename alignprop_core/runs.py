"""The run folder: its names, whole-or-absent writes, one writer at a time, metrics a line a step. No torch at import.

config.yaml  environment.json  metrics.jsonl  evaluation.json  report.html  lora/  checkpoints/  images/
"""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from alignprop_core._files import cannot_write, check_space, flush, says_full, write_atomic
from alignprop_core._lock import LOCK_NAME, FolderLock
from alignprop_core.errors import AlignpropError, OutputError
from alignprop_core.specs import RewardSpec

FILES = ("config.yaml", "environment.json", "metrics.jsonl", "evaluation.json", "report.html")
FOLDERS = ("lora", "checkpoints", "images")
_LIBRARIES = ("alignprop-core", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")


class RunFolder:
    """One run's folder. Make it with `create` or `open`; as a context manager it lets go of the lock at the end."""

    def __init__(self, path: Path, lock: FolderLock | None) -> None:
        self.path = path
        self._lock = lock
        self._metrics: IO[bytes] | None = None

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
        if not nearest.is_dir():
            raise OutputError(f"output: {nearest} is a file, and a folder is needed. Choose another output=.")
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
        self._close_metrics()
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
        """Add one line to metrics.jsonl, on disk for readers when this returns. A half line before it is cut off.

        Raises:
            OutputError: the disk is full; the lines before stay whole.
        """
        line = json.dumps(_plain(row), ensure_ascii=False).encode("utf-8") + b"\n"
        try:
            if self._metrics is None:
                _cut_half_line(self.metrics)
                self._metrics = open(self.metrics, "ab", buffering=0)  # noqa: SIM115
            start = self._metrics.seek(0, os.SEEK_END)
            written = 0
            try:
                while written < len(line):
                    written += self._metrics.write(line[written:])
            except OSError:
                self._metrics.truncate(start)
                raise
        except OSError as error:
            raise cannot_write(self.metrics, error) from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines of metrics.jsonl; a half-written last line is passed over.

        Raises:
            OutputError: a line before the last is damaged.
        """
        if not self.metrics.exists():
            return []
        rows: list[dict[str, Any]] = []
        lines = self.metrics.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is nothing, or half a line
            try:
                row = json.loads(line)
            except ValueError as error:
                raise OutputError(f"{self.metrics}, line {number}, is damaged ({error}). Remove that line.") from error
            rows.append(row)
        return rows

    def truncate_metrics(self, step: int) -> None:
        """Keep the lines up to and including `step`: what a run does before it goes on from a checkpoint at `step`."""
        if not self.metrics.exists():
            return
        kept = [row for row in self.read_metrics() if row.get("step", 0) <= step]
        self._close_metrics()
        self.write_text("metrics.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))

    def _close_metrics(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None


def write_json(path: Path, data: Any) -> Path:
    """Write JSON whole or not at all; NaN and infinities, which JSON has not, are written as null."""
    write_atomic(path, json.dumps(_plain(data), indent=2, ensure_ascii=False) + "\n")
    return path


def safe_name(text: str, *, longest: int = 80) -> str:
    """`text` as a plain file name: letters, digits, `.`, `-` and `_`; never empty, hidden, or a way out."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._-")[:longest].rstrip("._-")
    return name or "unnamed"


def environment(plugins: Iterable[str] = (), rewards: Iterable[RewardSpec] = ()) -> dict[str, Any]:
    """What a run ran on: versions of the core, its libraries and the `plugins` used (distribution names), the device,
    and the licences of the `rewards` and their weights. Imports torch.
    """
    import torch

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {name: _version(name) for name in _LIBRARIES},
        "plugins": {name: _version(name) for name in sorted(set(plugins))},
        "device": {
            "kind": "cuda" if cuda else "cpu",
            "names": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if cuda else [],
            "cuda": torch.version.cuda if cuda else None,
            "threads": torch.get_num_threads(),
        },
        "licenses": {
            spec.name: {"reward": spec.license, "weights": {file.file: file.license for file in spec.weights}}
            for spec in rewards
        },
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


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
            f"output: {path} exists already and is not empty (it holds {', '.join(names[:3])}). "
            "Choose another output=, or go on with that run: --resume latest."
        )
    if "config.yaml" not in names:
        raise OutputError(
            f"output: {path} holds something that is no run; it is not overwritten. Choose another output=."
        )


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


def _cut_half_line(file: Path) -> None:
    if not file.exists():
        return
    with open(file, "rb+") as opened:
        content = opened.read()
        opened.truncate(content.rfind(b"\n") + 1)


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: tensors and arrays of one number become that number, NaN and infinity null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
