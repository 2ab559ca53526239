"""Atomic file writes, shared by all modules that save to disk. Imports no torch."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

from alignprop_core.errors import OutputError

_FULL = {errno.ENOSPC, errno.EFBIG} | ({errno.EDQUOT} if hasattr(errno, "EDQUOT") else set())


def cannot_write(path: Path, error: OSError) -> OutputError:
    """Return the error for a write that failed: the file, the reason and what to do."""
    if error.errno in _FULL:
        return OutputError(
            f"Not enough disk space for {path}: {error.strerror}. Files saved earlier are complete. Free some space "
            "(or lower save.keep), or choose another output; --resume latest continues a training run."
        )
    return OutputError(
        f"Cannot write {path}: {error.strerror or error}. Check the folder's owner and permissions, or choose another "
        "output."
    )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` raised inside into the error that `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def read_table(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file; empty if there is no such file or it contains something else."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def disk_is_full(error: BaseException, folder: Path) -> bool:
    """Return whether a full disk caused a library's error; torch and safetensors raise other errors than OSError."""
    return any(os.strerror(number) in str(error) for number in _FULL) or bool(space_problem(folder, 1 << 20))


def space_problem(folder: Path, needed: int) -> str:
    """Return, as a sentence, that fewer than `needed` bytes are free below `folder`; empty if they are free."""
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(nearest).free
    return "" if free >= needed else f"Not enough disk space in {folder}: {_size(needed)} needed, {_size(free)} free."


def check_space(folder: Path, needed: int) -> None:
    """Raise OutputError if the disk below `folder` has fewer than `needed` bytes left."""
    if problem := space_problem(folder, needed):
        raise OutputError(
            f"{problem} Files saved earlier are complete. Free some space, or choose another output; --resume latest "
            "continues a training run."
        )


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) under a temporary name beside `path`, flush it to disk, then rename it.

    Whatever happens, `path` contains its old content or all of the new. A missing folder is created.

    Raises:
        OutputError: the disk is full or the folder cannot be written to; the old file is unchanged.
    """
    content = data.encode("utf-8") if isinstance(data, str) else data
    check_space(path.parent, len(content))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        flush(path.parent)


def write_json(path: Path, data: Any) -> Path:
    """Write JSON atomically; NaN and infinities, which JSON does not have, are written as null."""
    write_atomic(path, json.dumps(plain(data), indent=2, ensure_ascii=False) + "\n")
    return path


def plain(value: Any) -> Any:
    """Return `value` as JSON data: tensors and arrays become numbers or lists, NaN and infinity null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def safe_name(text: str, *, longest: int = 80) -> str:
    """Return `text` as a file name of letters, digits, `.`, `-` and `_`; never empty, hidden, or a path."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._-")[:longest].rstrip("._-")
    return name or "unnamed"


def unused_name(name: str, taken: Container[str], joint: str = "_") -> str:
    """Return the name, with the first free number from 2 on if it is taken: fox, fox_2, fox_3."""
    numbered = (f"{name}{joint}{number}" for number in count(2))
    return next(one for one in chain([name], numbered) if one not in taken)


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk (Windows cannot flush a folder)."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
