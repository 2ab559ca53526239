"""Time a whole training step against TRL 0.23.1's AlignPropTrainer: same machine, same process, in turns.

Both sides fine-tune the same base model in float32 with the same prompts, batch, denoising steps, guidance, reward,
adapter (rank 4 on the attention projections) and optimizer. Rounds go A B, B A, A B, ... so that a machine that slows
down slows both; each side's first step is not counted.

    make bench
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

# Before torch is imported: CPU only, and threads that sleep while they wait, so that a busy machine stays fair.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import accelerate
import diffusers
import torch
from torch import Tensor

from alignprop_core.config import RunConfig, parse_config
from alignprop_core.diffusion import load_pipeline
from alignprop_core.prompts import load_prompts
from alignprop_core.registry import Registry, default_registry
from alignprop_core.reward import ImageBatch, Reward
from alignprop_core.training.trainer import Trainer

RANK = 4  # TRL's adapter is fixed: rank 4, alpha 4, on to_q, to_k, to_v and to_out.0.
LEARNING_RATE = 1.0e-4
TARGET = 0.7
COMMAND = "make bench"


@dataclass(frozen=True)
class Comparison:
    """One row of the table.

    Attributes:
        name: what is compared.
        backprop: alignprop's `backprop` section.
        forced: TRL keeps the steps alignprop keeps in the same round; otherwise it draws cuts from (0, steps) its way.
    """

    name: str
    backprop: dict[str, Any]
    forced: bool


COMPARISONS = (
    Comparison("`uniform`; TRL keeps the same number of steps", {"strategy": "uniform"}, forced=True),
    Comparison("`uniform`; TRL draws its own cuts from (0, steps)", {"strategy": "uniform"}, forced=False),
    Comparison("last 4 steps on both sides", {"strategy": "last_k", "k": 4}, forced=True),
)


@dataclass(frozen=True)
class Row:
    """Seconds a step of one comparison."""

    name: str
    kept: list[int]
    ours: list[float]
    theirs: list[float]

    @property
    def ratio(self) -> float:
        """Ratio of the medians."""
        return statistics.median(self.ours) / statistics.median(self.theirs)


class TrlSide:
    """TRL's trainer on a diffusers folder."""

    def __init__(self, folder: Path, config: RunConfig, prompts: Sequence[str], reward: Reward) -> None:
        accelerate.PartialState()  # TRL logs through accelerate while it is being imported.
        from trl import AlignPropConfig, AlignPropTrainer
        from trl.models import DefaultDDPOStableDiffusionPipeline

        def score(images: Tensor, texts: Sequence[str], metadata: Sequence[Any]) -> tuple[Tensor, dict[str, Any]]:
            return reward(ImageBatch(images=images, prompts=texts)), {}

        self.steps = config.sampling.steps
        self.config = AlignPropConfig(
            mixed_precision="no",
            sample_num_steps=self.steps,
            sample_guidance_scale=config.sampling.guidance_scale,
            sample_eta=config.sampling.eta,
            train_batch_size=config.training.batch_size,
            train_learning_rate=LEARNING_RATE,
            truncated_rand_backprop_minmax=(0, self.steps),
        )
        texts = cycle(prompts)
        pipeline = DefaultDDPOStableDiffusionPipeline(str(folder), use_lora=True)
        self.trainer = AlignPropTrainer(self.config, score, lambda: (next(texts), {}), pipeline)
        pipeline.set_progress_bar_config(disable=True)
        self.done = 0

    def step(self, kept: int | None) -> float:
        """Train one step and return its seconds; the last `kept` steps keep their gradient, or its own draw if None."""
        self.config.truncated_backprop_rand = kept is None
        if kept is not None:
            self.config.truncated_backprop_timestep = self.steps - kept
        start = time.perf_counter()
        self.done = self.trainer.step(0, self.done)  # Its epoch 0 writes no checkpoint.
        return time.perf_counter() - start


class OurSide:
    """alignprop's trainer on the same folder."""

    def __init__(self, config: RunConfig, registry: Registry) -> None:
        self.trainer = Trainer(config, registry=registry)

    def kept(self) -> int:
        """Return how many steps keep their gradient in the next training step."""
        plan = self.trainer.sampler.plan(seed=self.trainer.config.training.seed, step=self.trainer.step_number)
        return len(plan.kept)

    def step(self) -> float:
        """Train one step and return its seconds."""
        start = time.perf_counter()
        self.trainer.step()
        return time.perf_counter() - start


def compare(comparison: Comparison, ours: OurSide, theirs: TrlSide, rounds: int) -> Row:
    """Run both sides in turns."""
    row = Row(comparison.name, [], [], [])
    for i in range(rounds + 1):
        kept = ours.kept()
        seconds: dict[str, float] = {}
        for side in ("ours", "theirs") if i % 2 else ("theirs", "ours"):
            seconds[side] = ours.step() if side == "ours" else theirs.step(kept if comparison.forced else None)
        if i == 0:
            continue
        row.kept.append(kept)
        row.ours.append(seconds["ours"])
        row.theirs.append(seconds["theirs"])
        print(f"{comparison.name}: kept {kept}, {seconds['ours']:.2f} s against {seconds['theirs']:.2f} s", flush=True)
    return row


def report(rows: Sequence[Row], config: RunConfig, model: str, reward: str) -> str:
    """Write the page."""
    sampling, training = config.sampling, config.training
    lines = [
        "# A training step against TRL's AlignPropTrainer",
        "",
        f"Made by `{COMMAND}` (`tests/bench/trl_step.py`), which writes this page.",
        "",
        f"Model `{model}`, reward `{reward}`, float32, {training.batch_size} images a step, {sampling.steps} denoising "
        f"steps, guidance {sampling.guidance_scale:g}, LoRA rank {RANK} on the attention projections, AdamW. A step is "
        "everything from prompts to updated adapters. Both trainers run in one process and take turns; the seconds are "
        f"medians over {len(rows[0].ours)} steps after one that is not counted. The goal: a ratio of at most {TARGET}.",
        "",
        "| comparison | steps kept (mean) | alignprop, s | TRL 0.23.1, s | ratio of medians | ratio of totals |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.name} | {statistics.mean(row.kept):.1f} | {statistics.median(row.ours):.2f} "
        f"| {statistics.median(row.theirs):.2f} | {row.ratio:.2f} | {sum(row.ours) / sum(row.theirs):.2f} |"
        for row in rows
    ]
    lines += [
        "",
        "Where TRL draws its own cuts it draws again at every denoising step, so step *i* of *T* keeps its gradient "
        'with probability *i* / (*T* + 1): *T* / 2 steps on average, against (*T* + 1) / 2 here. "Steps kept" is '
        "alignprop's number.",
        "",
        "Where the time goes: TRL recomputes every kept step in the backward pass, whether or not memory is short, "
        "builds a graph for steps whose gradient it then drops, and encodes every prompt at every step.",
        "",
        f"Machine: {os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads; Python "
        f"{platform.python_version()}, torch {torch.__version__.partition('+')[0]}, diffusers {diffusers.__version__}.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Run every comparison; exit 1 if one misses the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter", help="registered model or diffusers folder")
    parser.add_argument("--prompts", default="starter/simple_animals", help="prompt set or file")
    parser.add_argument("--reward", default="jpeg_compressibility")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=12, help="counted steps of each side and comparison")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default, the machine's cores")
    parser.add_argument("--output", type=Path, help="page to write")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # TRL's and diffusers' deprecations; they are not what is measured.
    if options.threads:
        torch.set_num_threads(options.threads)
    registry = default_registry()

    with tempfile.TemporaryDirectory() as scratch:

        def config(backprop: dict[str, Any]) -> RunConfig:
            data = {
                "model": {"base": options.model},
                "prompts": {"train": options.prompts},
                "sampling": {"steps": options.steps, "guidance_scale": options.guidance},
                "backprop": backprop,
                "lora": {"rank": RANK},
                "optimizer": {"learning_rate": LEARNING_RATE},
                "rewards": [{"name": options.reward}],
                "training": {"batch_size": options.batch, "device": "cpu"},
                "output": f"{scratch}/run",
            }
            return parse_config(data, registry=registry)

        first = config(COMPARISONS[0].backprop)
        folder = Path(scratch) / "model"
        load_pipeline(first.model.base, registry=registry).save_pretrained(folder)
        prompts = load_prompts(first.prompts.train, registry).prompts
        theirs = TrlSide(folder, first, prompts, registry.load_reward(options.reward))
        rows = [
            compare(comparison, OurSide(config(comparison.backprop), registry), theirs, options.rounds)
            for comparison in COMPARISONS
        ]
    page = report(rows, first, options.model, options.reward)
    print(page)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(page, encoding="utf-8")
    return int(any(row.ratio > TARGET for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
