"""Compare the time of an isolated reward with that of the same reward in this process.

    python -m tests.bench.isolation_overhead [--output docs/results/isolation.md]

Each round times both, one after the other. The table reports medians and the median difference per round. An isolated
reward additionally copies the images and their gradients through a shared file.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.progress import track

from alignprop_core.registry.registry import default_registry
from alignprop_core.reward import ImageBatch, Reward
from alignprop_isolation.config import IsolationConfig
from alignprop_isolation.install import make_environment
from alignprop_isolation.lookup import IsolatedRewards

CASES = [
    ("jpeg_compressibility", {}, 8, 128),
    ("jpeg_compressibility", {}, 8, 512),
    ("hpsv2", {"weights": "starter"}, 8, 128),
    ("hpsv2", {"weights": "starter"}, 8, 512),
]


def seconds(reward: Reward, images: torch.Tensor) -> float:
    """Time scores and gradient of one batch."""
    images = images.clone().requires_grad_()
    start = time.perf_counter()
    reward(ImageBatch(images=images, prompts=["a fox"] * len(images))).sum().backward()
    return time.perf_counter() - start


def main() -> None:
    """Measure every case and print or write a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    registry = default_registry()
    with tempfile.TemporaryDirectory() as folder:
        python = make_environment(Path(folder) / "environment", [], share=True)
        isolation = IsolatedRewards(IsolationConfig(python=str(python)), registry)
        rows = []
        for name, options, size, side in CASES:
            start = time.perf_counter()
            isolated = isolation.load_reward(name, options)
            loading = time.perf_counter() - start
            local = registry.load_reward(name, options)
            images = torch.rand(size, 3, side, side)
            for reward in (local, isolated):
                seconds(reward, images)
            rounds = [
                (seconds(local, images), seconds(isolated, images))
                for _ in track(range(arguments.rounds), description=f"{name} {side}")
            ]
            local_ms, isolated_ms = (statistics.median(column) * 1e3 for column in zip(*rounds, strict=True))
            difference = statistics.median(b - a for a, b in rounds) * 1e3
            mib = 2 * images.numel() * 4 / 2**20
            cells = [f"`{name}`", f"{size} x {side} x {side}", f"{mib:.1f}"]
            cells += [f"{local_ms:.1f}", f"{isolated_ms:.1f}", f"{difference:+.1f}", f"{loading:.1f}"]
            rows.append(f"| {' | '.join(cells)} |")
    text = "\n".join(
        [
            "# Overhead of isolated rewards",
            "",
            "```bash",
            "python -m tests.bench.isolation_overhead --output docs/results/isolation.md",
            "```",
            "",
            f"Threads per process: {torch.get_num_threads()}; torch {torch.__version__}, medians of "
            f"{arguments.rounds} rounds. A round scores one batch and computes its gradient, once in this process and "
            "once isolated. Loading is the time to start the worker: Python, torch and the reward.",
            "",
            "| reward | images | MiB in the file | in this process, ms | isolated, ms | difference, ms | loading, s |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )
    if arguments.output is None:
        sys.stdout.write(text)
    else:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
