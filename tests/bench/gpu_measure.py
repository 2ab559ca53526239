"""Seconds, memory, GPU utilization and straight-line fits of `gpu_step`. On a CPU only the seconds are measured."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

GIB = 1024**3
SYNCHRONIZING = ("cudaStreamSynchronize", "cudaEventSynchronize")
"""CUDA calls in which the host waits for the GPU, except cudaDeviceSynchronize, which the measurement itself calls."""

Step = Callable[[], object]


@dataclass
class Measurement:
    """One side of a comparison.

    Attributes:
        seconds: of each counted step.
        build_seconds: from the shared networks to a side that can train.
        first_seconds: of the first step, which may compile or capture.
        first_peak_gib: peak of reserved memory in the first step.
        built_gib: memory that was reserved before the side was built: the shared weights, and what other sides keep.
        before_gib: memory that was reserved before the step in which the peak was measured.
        peak_gib: peak of reserved memory in a step after the first.
        allocated_gib: peak of allocated memory in the same step.
        profile: see `profile`.
    """

    seconds: list[float] = field(default_factory=list)
    build_seconds: float = 0.0
    first_seconds: float = 0.0
    first_peak_gib: float = 0.0
    built_gib: float = 0.0
    before_gib: float = 0.0
    peak_gib: float = 0.0
    allocated_gib: float = 0.0
    profile: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the values, seconds and GiB."""
        return asdict(self)


def on_gpu() -> bool:
    """Whether there is a GPU to measure."""
    return torch.cuda.is_available()


def synchronize() -> None:
    """Wait for the GPU."""
    if on_gpu():
        torch.cuda.synchronize()


def free() -> float:
    """Give unused memory back to the driver; returns the GiB still reserved."""
    gc.collect()
    if not on_gpu():
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() / GIB


def seconds_of(step: Step) -> float:
    """Run a step and return its seconds, from idle GPU to idle GPU."""
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def memory_of(step: Step) -> tuple[float, float, float, float]:
    """Run a step; returns GiB reserved before it, peaks of reserved and allocated GiB in it, and its seconds."""
    before = free()
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(step)
    if not on_gpu():
        return 0.0, 0.0, 0.0, seconds
    return before, torch.cuda.max_memory_reserved() / GIB, torch.cuda.max_memory_allocated() / GIB, seconds


def profile(step: Step) -> dict[str, float]:
    """Run a step under the profiler.

    Returns:
        wall_s: seconds of the step, which the profiler slows down.
        busy_s: seconds in which at least one kernel or copy ran.
        busy_share: busy_s / wall_s.
        kernels: kernels and copies.
        synchronizations: calls in which the host waited (SYNCHRONIZING).
        copies_to_host: copies from the GPU.

        Empty on a CPU.
    """
    if not on_gpu():
        return {}
    synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        wall = seconds_of(step)
    intervals, waits, copies = [], 0, 0
    # The raw events: an object for each of a step's hundred thousand kernels would take longer than the step.
    for event in profiler.profiler.kineto_results.events():
        name = event.name()
        if event.device_type().name == "CUDA":
            if name.startswith(("gpu_user_annotation", "ProfilerStep")):
                continue
            intervals.append((event.start_ns(), event.start_ns() + event.duration_ns()))
            copies += "DtoH" in name
        elif name in SYNCHRONIZING:
            waits += 1
    busy = union(intervals) / 1e9
    return {
        "wall_s": wall,
        "busy_s": busy,
        "busy_share": busy / wall,
        "kernels": len(intervals),
        "synchronizations": waits,
        "copies_to_host": copies,
    }


def union(intervals: Sequence[tuple[int, int]]) -> int:
    """Return the length that overlapping intervals cover together."""
    total, end = 0, 0
    for start, stop in sorted(intervals):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def matmul_rate(size: int = 8192, repeats: int = 10) -> float:
    """Return the TFLOP/s of bfloat16 matrix products of random square matrices; 0 on a CPU."""
    if not on_gpu():
        return 0.0
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def products(count: int) -> None:
        for _ in range(count):
            torch.mm(a, b)

    products(3)
    return repeats * 2 * size**3 / seconds_of(lambda: products(repeats)) / 1e12


@dataclass(frozen=True)
class Fit:
    """y = intercept + slope * x by least squares, and the share of the variance it explains."""

    slope: float
    intercept: float
    r2: float

    @classmethod
    def of(cls, x: Sequence[float], y: Sequence[float]) -> Fit:
        """Fit the points; a single one gives a constant."""
        mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
        spread = sum((a - mean_x) ** 2 for a in x)
        together = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
        slope = together / spread if spread else 0.0
        intercept = mean_y - slope * mean_x
        rest = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
        total = sum((b - mean_y) ** 2 for b in y)
        return cls(slope, intercept, 1 - rest / total if total else 1.0)
