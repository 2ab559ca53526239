"""Compare the time of a complete training step with TRL 0.23.1's AlignPropTrainer, in one process, alternating.

Both sides fine-tune the same base model in float32 with the same prompts, batch, denoising steps, guidance, reward,
adapter (rank 4 on the attention projections) and optimizer. The order alternates (A B, B A, A B, ...) so that a machine
that slows down affects both sides equally. The first step of each side is a warm-up and not counted.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

# Set before torch is imported: CPU only; waiting threads sleep, so that the idle side takes no CPU time.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import accelerate
import diffusers
import torch
import transformers
from torch import Tensor

from alignprop_core.config.load import load_config
from alignprop_core.config.sections import RunConfig
from alignprop_core.diffusion.loading import load_pipeline
from alignprop_core.diffusion.truncation import draw_truncation
from alignprop_core.prompts import load_prompts
from alignprop_core.registry.registry import default_registry
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
        forced: TRL keeps the same steps as alignprop in the same round; otherwise it samples its own truncation from
            (0, steps).
    """

    name: str
    backprop: dict[str, Any]
    forced: bool


COMPARISONS = (
    Comparison("`uniform`; TRL keeps the same number of steps", {"strategy": "uniform"}, forced=True),
    Comparison("`uniform`; TRL samples its own truncation from (0, steps)", {"strategy": "uniform"}, forced=False),
    Comparison("last 4 steps on both sides", {"strategy": "last_k", "k": 4}, forced=True),
)


@dataclass(frozen=True)
class Times:
    """Seconds of one side's steps: wall-clock time, and CPU time over all threads."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def measure(self, step: Callable[[], object]) -> None:
        """Run a step and record its seconds."""
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)

    def without_warm_up(self) -> Times:
        """Return the times without the first step."""
        return Times(self.wall[1:], self.cpu[1:])


@dataclass(frozen=True)
class Row:
    """One comparison's times."""

    name: str
    kept: list[int]
    ours: Times
    theirs: Times

    @property
    def ratio(self) -> float:
        """Ratio of the median wall-clock times."""
        return statistics.median(self.ours.wall) / statistics.median(self.theirs.wall)


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

    def step(self, kept: int | None) -> None:
        """Train one step. The last `kept` denoising steps keep their gradient; None lets TRL sample their number."""
        self.config.truncated_backprop_rand = kept is None
        if kept is not None:
            self.config.truncated_backprop_timestep = self.steps - kept
        self.done = self.trainer.step(0, self.done)  # TRL writes no checkpoint in epoch 0.


def kept_next(trainer: Trainer) -> int:
    """Return how many denoising steps keep their gradient in alignprop's next training step."""
    return len(
        draw_truncation(
            trainer.sampler.backprop,
            trainer.sampler.step_sizes,
            seed=trainer.config.training.seed,
            step=trainer.step_number,
        ).kept
    )


def compare(comparison: Comparison, ours: Trainer, theirs: TrlSide, rounds: int) -> Row:
    """Run both sides alternately: one warm-up round, then `rounds` counted rounds."""
    row = Row(comparison.name, [], Times(), Times())
    for i in range(rounds + 1):
        kept = kept_next(ours)
        turns: list[tuple[Times, Callable[[], object]]] = [
            (row.ours, ours.step),
            (row.theirs, partial(theirs.step, kept if comparison.forced else None)),
        ]
        for times, step in turns if i % 2 else reversed(turns):
            times.measure(step)
        row.kept.append(kept)
        print(f"{comparison.name}: kept {kept}, {row.ours.wall[-1]:.2f} s, TRL {row.theirs.wall[-1]:.2f} s", flush=True)
    return Row(comparison.name, row.kept[1:], row.ours.without_warm_up(), row.theirs.without_warm_up())


def report(rows: Sequence[Row], config: RunConfig, model: str, reward: str) -> str:
    """Return the Markdown page."""
    sampling, training = config.sampling, config.training
    lines = [
        "# Training step time against TRL's AlignPropTrainer",
        "",
        f"Generated by `{COMMAND}` (`tests/bench/trl_step.py`).",
        "",
        f"Model `{model}`, reward `{reward}`, float32, {training.batch_size} images per step, {sampling.steps} "
        f"denoising steps, guidance {sampling.guidance_scale:g}, LoRA rank {RANK} on the attention projections, AdamW. "
        "A step is everything from prompts to updated adapters. Both trainers run alternately in one process. The "
        f"seconds are medians over {len(rows[0].kept)} steps after one warm-up step. The goal is a ratio of at most "
        f"{TARGET}.",
        "",
        "| comparison | steps kept (mean) | alignprop, s | TRL 0.23.1, s | ratio of medians | ratio of CPU time |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.name} | {statistics.mean(row.kept):.1f} | {statistics.median(row.ours.wall):.2f} "
        f"| {statistics.median(row.theirs.wall):.2f} | {row.ratio:.2f} "
        f"| {sum(row.ours.cpu) / sum(row.theirs.cpu):.2f} |"
        for row in rows
    ]
    lines += [
        "",
        "TRL's own truncation is sampled again at every denoising step, so step *i* of *T* keeps its gradient with "
        "probability *i* / (*T* + 1): *T* / 2 steps on average. alignprop keeps (*T* + 1) / 2 on average. The column "
        '"steps kept" is alignprop\'s.',
        "",
        "TRL is slower because it recomputes every kept step in the backward pass even if memory is sufficient, uses "
        "the slower memory layout for convolutions, and encodes every prompt at every step.",
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
    parser.add_argument("--rounds", type=int, default=12, help="counted steps per side and comparison")
    parser.add_argument("--threads", type=int, default=0, help="0 is torch's default, the number of cores")
    parser.add_argument("--output", type=Path, help="page to write")
    options = parser.parse_args()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")  # Deprecation warnings of TRL and diffusers.
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
            return load_config(data, registry=registry)

        first = config(COMPARISONS[0].backprop)
        folder = Path(scratch) / "model"
        load_pipeline(first.model.base, registry=registry).save_pretrained(folder)
        prompts = load_prompts(first.prompts.train, registry).prompts
        theirs = TrlSide(folder, first, prompts, registry.load_reward(options.reward))
        rows = [
            compare(comparison, Trainer(config(comparison.backprop), registry=registry), theirs, options.rounds)
            for comparison in COMPARISONS
        ]
    page = report(rows, first, options.model, options.reward)
    print(page)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(page, encoding="utf-8")
    missed = [row.name for row in rows if row.ratio > TARGET]
    if missed:
        print(f"The goal of {TARGET} was missed: {', '.join(missed)}")
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
