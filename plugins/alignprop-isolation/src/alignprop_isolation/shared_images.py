"""The memory-mapped file through which two processes exchange images, gradients and scores."""

from __future__ import annotations

import mmap
import os
from math import prod
from pathlib import Path

import torch
from torch import Tensor


class SharedImages:
    """A file that both processes map: B images, then their gradients, then B scores.

    Args:
        path: the file. The run's process enlarges it (`reserve`) if a batch needs more; the worker then maps it again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Make the file large enough for a batch, and map it."""
        size = _size(shape, dtype)
        if self._map is None or len(self._map) < size:
            self.close()
            with self.path.open("r+b") as file:
                file.truncate(size)
        self._open(size)

    def _open(self, size: int) -> None:
        if self._map is not None and len(self._map) >= size:
            return
        self.close()
        with self.path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    def images(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a view of the (B, 3, H, W) images in the file; it is valid until the next batch."""
        return self._part(shape, dtype, 0)

    def gradients(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a view of the (B, 3, H, W) gradients in the file."""
        return self._part(shape, dtype, _aligned(prod(shape) * dtype.itemsize))

    def scores(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a view of the (B,) scores in the file, float64, which represents float32 exactly."""
        return self._part(shape[:1], torch.float64, 2 * _aligned(prod(shape) * dtype.itemsize))

    def _part(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> Tensor:
        self._open(offset + prod(shape) * dtype.itemsize)
        assert self._map is not None
        return torch.frombuffer(self._map, dtype=dtype, count=prod(shape), offset=offset).view(shape)

    def close(self) -> None:
        """Unmap the file."""
        if self._map is not None:
            self._map.close()
            self._map = None


def shared_folder() -> str | None:
    """Return the folder for the file: in memory (/dev/shm on Linux), or None for the temporary folder."""
    memory = "/dev/shm"
    return memory if os.path.isdir(memory) and os.access(memory, os.W_OK) else None


def _aligned(size: int) -> int:
    """Round up to 64 bytes, so that each part is aligned for every dtype."""
    return (size + 63) // 64 * 64


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return 2 * _aligned(prod(shape) * dtype.itemsize) + shape[0] * torch.float64.itemsize
