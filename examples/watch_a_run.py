"""Train from Python with a callback that receives every step.

python examples/watch_a_run.py [CONFIG] [KEY=VALUE ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

from alignprop_core import Callback, StepStats, Trainer, train


class BestSoFar(Callback):
    """Print each step that exceeds the best total so far; callbacks can read the trainer and its run folder."""

    def __init__(self) -> None:
        self.best = float("-inf")

    def on_step(self, trainer: Trainer, stats: StepStats) -> None:
        """Compare this step's total with the best total."""
        if stats.total > self.best:
            self.best = stats.total
            print(f"step {stats.step}: best total so far, {stats.total:.4g}")


if __name__ == "__main__":
    default = Path(__file__).with_name("jpeg_compressibility.yaml")
    config, *overrides = sys.argv[1:] or [str(default)]
    print(f"The run is in {train(config, overrides, callbacks=[BestSoFar()])}")
