"""What a reward costs in an environment of its own, against the same reward in this process.

    python -m tests.bench.isolation_overhead [--output docs/results/isolation.md]

Each round times both, one after the other; the table has medians and the median of the rounds' differences. Besides the
reward itself, an isolated one copies the images into the shared file and out of it, and as many gradients back.
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
        there = IsolatedRewards(IsolationConfig(python=str(python)), registry)
        rows = []
        for name, options, size, side in CASES:
            start = time.perf_counter()
            isolated = there.load_reward(name, options)
            loading = time.perf_counter() - start
            own = registry.load_reward(name, options)
            images = torch.rand(size, 3, side, side)
            for reward in (own, isolated):
                seconds(reward, images)
            rounds = [
                (seconds(own, images), seconds(isolated, images))
                for _ in track(range(arguments.rounds), description=f"{name} {side}")
            ]
            here, away = (statistics.median(column) * 1e3 for column in zip(*rounds, strict=True))
            more = statistics.median(b - a for a, b in rounds) * 1e3
            mib = 2 * images.numel() * 4 / 2**20
            facts = [f"`{name}`", f"{size} x {side} x {side}", f"{mib:.1f}"]
            facts += [f"{here:.1f}", f"{away:.1f}", f"{more:+.1f}", f"{loading:.1f}"]
            rows.append(f"| {' | '.join(facts)} |")
    text = "\n".join(
        [
            "# A reward in an environment of its own: what it costs",
            "",
            "```bash",
            "python -m tests.bench.isolation_overhead --output docs/results/isolation.md",
            "```",
            "",
            f"{torch.get_num_threads()} thread(s) in each process, torch {torch.__version__}, medians of "
            f"{arguments.rounds} rounds, each round both ways. A batch is scored and its gradient taken; nothing else "
            "differs. Loading is the worker's start: Python, torch and the reward.",
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
