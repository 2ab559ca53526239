"""Files that are whole or absent: what every room that saves something writes with. No torch."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignprop_core.errors import OutputError

_FULL = {errno.ENOSPC, errno.EFBIG} | ({errno.EDQUOT} if hasattr(errno, "EDQUOT") else set())


def cannot_write(path: Path, error: OSError) -> OutputError:
    """The one clear message for a write that failed; name the file, the reason and what to do."""
    if error.errno in _FULL:
        return OutputError(
            f"No room to write {path}: {error.strerror}. Files saved before are whole. Free some space (or lower "
            "save.keep), or choose another output; a training run goes on with --resume latest."
        )
    return OutputError(
        f"Cannot write {path}: {error.strerror or error}. Check who owns the folder and whether it can be written to, "
        "or choose another output."
    )


def read_table(path: Path) -> dict[str, Any]:
    """Return what a JSON file of ours holds; empty where there is none, or it holds something else."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def says_full(error: BaseException, folder: Path) -> bool:
    """Whether a library's own error comes of a full disk: torch and safetensors do not raise OSError for it."""
    told = any(os.strerror(number) in str(error) for number in _FULL)
    return told or shutil.disk_usage(folder).free < 1 << 20


def check_space(folder: Path, needed: int) -> None:
    """Raise OutputError if the disk below `folder` has fewer than `needed` bytes left."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"No room in {folder}: {_size(needed)} are needed and {_size(free)} are free. Files saved "
            "before are whole. Free some space, or choose another output; a training run goes on with --resume latest."
        )


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) under a temporary name beside `path`, flush it to disk, then rename it.

    Whatever happens, `path` holds its old content or all of the new. The folder is made if it is missing.

    Raises:
        OutputError: the disk is full or the folder cannot be written to; the old file is as it was.
    """
    content = data.encode("utf-8") if isinstance(data, str) else data
    check_space(path.parent, len(content))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
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
    except OSError as error:
        raise cannot_write(path, error) from error


def write_json(path: Path, data: Any) -> Path:
    """Write JSON whole or not at all; NaN and infinities, which JSON has not, are written as null."""
    write_atomic(path, json.dumps(plain(data), indent=2, ensure_ascii=False) + "\n")
    return path


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: tensors and arrays of one number become that number, NaN and infinity null."""
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
    """`text` as a plain file name: letters, digits, `.`, `-` and `_`; never empty, hidden, or a way out."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._-")[:longest].rstrip("._-")
    return name or "unnamed"


def flush(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk itself (Windows cannot flush a folder: left alone there)."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
