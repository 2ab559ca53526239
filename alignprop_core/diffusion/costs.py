"""What a training step on a GPU will cost, predicted from its parts before the first one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Costs:
    """A prediction for a training step.

    Attributes:
        seconds: its time.
        peak_memory: bytes: the memory PyTorch will have reserved at its peak.
        level: in words, what is recomputed and how much of a batch is computed at a time.
    """

    seconds: float
    peak_memory: int
    level: str

    def __str__(self) -> str:
        return f"{self.level}; predicted: {self.peak_memory / 2**30:.1f} GiB at the peak, {self.seconds:.2f} s per step"

    def as_json(self) -> dict[str, float]:
        """Return the numbers for metrics.jsonl."""
        return {"seconds": self.seconds, "peak_memory": self.peak_memory}


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a GPU needs for something that has run before: the better of two."""
    found = []
    run()
    for _ in range(2):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found)
