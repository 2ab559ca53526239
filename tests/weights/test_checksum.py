"""Checksums of files: computed once per content, and again after every change."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from alignprop_core.weights import checksum as module
from alignprop_core.weights.checksum import checksum


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "LARGE", 1000)
    module._checksum.cache_clear()
    return tmp_path / "cache" / "alignprop" / "checksums.json"


def test_a_large_file_is_read_once_even_by_later_processes(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"w" * 5000)
    found = checksum(file)
    assert found == hashlib.sha256(file.read_bytes()).hexdigest()
    known = json.loads(cache.read_text())
    assert known[str(file)][0] == found
    known[str(file)][0] = "as remembered"
    cache.write_text(json.dumps(known))
    assert checksum(file) == found, "this process remembers it itself"
    module._checksum.cache_clear()  # as in another process
    assert checksum(file) == "as remembered"


def test_a_change_that_keeps_size_and_time_of_modification_is_found(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"w" * 5000)
    before, times = checksum(file), file.stat()
    file.write_bytes(b"v" * 5000)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert checksum(file) == hashlib.sha256(b"v" * 5000).hexdigest() != before


def test_small_files_and_a_cache_that_cannot_be_written_need_none(cache: Path, tmp_path: Path) -> None:
    small, large = tmp_path / "small.json", tmp_path / "large.bin"
    small.write_bytes(b"{}")
    large.write_bytes(b"x" * 2000)
    assert checksum(small) == hashlib.sha256(b"{}").hexdigest()
    assert not cache.exists()
    cache.parent.parent.write_text("a file in the way of the folder")
    assert checksum(large) == hashlib.sha256(b"x" * 2000).hexdigest()
