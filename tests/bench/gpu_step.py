"""Compare a training step at Stable Diffusion 1.5's size on one GPU: alignprop, TRL 0.23.1 and plain autograd.

All sides share the weights (random, bfloat16), the CLIP ViT-L/14 reward, the prompts, batch, denoising steps and kept
steps, and run in one process; the order alternates from round to round. A step is everything from prompts to updated
adapters. A side's memory is measured before the next side is built. `--tiny` tests the script on a CPU.

    make bench-gpu
    python -m tests.bench.gpu_step --rows last8_b4,full_b1 --json results.jsonl --output page.md --plot plots
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

# Set before transformers is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import accelerate
import diffusers
import torch
import transformers
from peft import LoraConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alignprop_core.config.load import load_config
from alignprop_core.config.model import BackpropConfig
from alignprop_core.config.sections import RunConfig
from alignprop_core.diffusion.truncation import draw_truncation
from alignprop_core.errors import ConfigError
from alignprop_core.registry.registry import Registry, default_registry
from alignprop_core.training.given_pipeline import base_of
from alignprop_core.training.trainer import Trainer
from tests.bench import gpu_measure, gpu_report
from tests.bench.gpu_measure import Measurement
from tests.bench.gpu_models import Models

LEVELS: dict[str, dict[str, Any]] = {
    "default": {},
    "blocks": {"backprop": {"checkpoint_blocks": True}},
    "compiled": {"training": {"compile": "blocks"}},
    "decode1": {"backprop": {"decode_batch_size": 1}},
    "lean": {"backprop": {"checkpoint_blocks": True, "decode_batch_size": 1}},
    "stored": {"backprop": {"checkpoint_steps": False, "checkpoint_decoder": False}},
}
"""Variants of alignprop: changes of the run config. A level whose key the config refuses is skipped."""


@dataclass(frozen=True)
class Bar:
    """A goal: a measure of alignprop is at most (`useful`: at least) `limit`.

    Attributes:
        measure: seconds, gib (see `own_gib`), or useful: useful TFLOP/s as a share of the matrix product's rate.
        limit: in the measure's unit, or a ratio if there is something to compare with.
        to: the side, or another row's first level, that the measure is divided by.
        level: the level of alignprop; the row's first if empty.
    """

    measure: str
    limit: float
    to: str = ""
    level: str = ""


@dataclass(frozen=True)
class Row:
    """One comparison: what all sides do, and who takes part.

    Attributes:
        title: shown above the table.
        backprop: alignprop's `backprop` section; for rivals only its number of last steps counts.
        batch: images per step.
        size: width and height in pixels.
        rewards: number of rewards.
        levels: names in LEVELS.
        rivals: trl, plain; only with `last_k`, `uniform` and `full`, one reward and the model's own size.
        bars: goals.
    """

    title: str
    backprop: Mapping[str, Any]
    batch: int = 4
    size: int = 512
    rewards: int = 1
    levels: tuple[str, ...] = ("default",)
    rivals: tuple[str, ...] = ()
    bars: tuple[Bar, ...] = ()


def last(k: int) -> dict[str, Any]:
    """Return the `backprop` section of the last k steps."""
    return {"strategy": "last_k", "k": k}


def trl_bars(faster: float, memory: float, level: str = "") -> tuple[Bar, ...]:
    """Return a level's goals against TRL: that many times faster, and a share of its memory."""
    return Bar("seconds", 1 / faster, "trl", level), Bar("gib", memory, "trl", level)


BOTH = ("trl", "plain")
NOT_SLOWER = (Bar("seconds", 1.05, "last8_b1"), Bar("gib", 1.02, "last8_b1"))
"""As fast as the last 8 steps with the same memory, within what repeated runs differ by."""
ONE = Row("batch 1, last 8", last(8), batch=1)

ROWS = {
    "last8_b4": Row(
        "batch 4, last 8 steps",
        last(8),
        levels=("default", "blocks", "compiled"),
        rivals=BOTH,
        bars=(*trl_bars(2.7, 0.7), *trl_bars(2.4, 0.45, "blocks"), *trl_bars(3.5, 0.7, "compiled")[:1]),
    ),
    "uniform_b4": Row(
        "batch 4, `uniform` over all steps",
        {"strategy": "uniform"},
        levels=("default", "compiled"),
        rivals=("trl",),
        bars=(*trl_bars(2.7, 0.7), *trl_bars(2.7, 0.7, "compiled")),
    ),
    "full_b1": Row("batch 1, all steps", {"strategy": "full"}, batch=1, bars=(Bar("seconds", 3.0), Bar("gib", 6.0))),
    "last8_b16": Row("batch 16, last 8 steps", last(8), batch=16, bars=(Bar("useful", 0.25),)),
    "last8_b1": replace(ONE, title="batch 1, last 8 steps"),
    "drtune8_b1": Row("batch 1, DRTune, 8 steps", {"strategy": "drtune", "k": 8}, batch=1, bars=NOT_SLOWER),
    "sparse8_b1": Row("batch 1, FlowBP-Sparse, 8 steps", {"strategy": "sparse", "k": 8}, batch=1, bars=NOT_SLOWER),
}
SWEEPS: dict[str, tuple[str, dict[float, Row]]] = {
    "scaling_kept": ("steps kept, batch 1", {k: replace(ONE, backprop=last(k)) for k in (1, 4, 8, 16, 32, 50)}),
    "scaling_batch": ("images per batch, last 8", {b: replace(ONE, batch=b) for b in (1, 2, 4, 8)}),
    "scaling_size": (
        "megapixels, batch 1, last 8",
        {size**2 / 1e6: replace(ONE, size=size) for size in (256, 384, 512, 768)},
    ),
    "scaling_rewards": ("rewards, batch 1, last 8", {n: replace(ONE, rewards=n) for n in (1, 2, 4)}),
}
GROUPS = {"all": (*ROWS, *SWEEPS), "comparisons": tuple(ROWS), "scaling": tuple(SWEEPS)}

KINDS = ("machine", "result", "point", "failed")
"""Kinds of records in the file of results."""

RANK = 4  # TRL's adapter is fixed: rank 4, alpha 4, on to_q, to_k, to_v and to_out.0.
LEARNING_RATE = 1.0e-4
ANIMALS = ("cat", "dog", "horse", "rabbit", "zebra", "lion", "frog", "duck", "owl", "fox", "bear", "tiger")
PROMPTS = [f"a photo of a {animal}" for animal in ANIMALS]
UNET_TFLOP, DECODE_TFLOP = 0.80, 2.51
"""Work of one forward pass at 512 pixels, per image (a guided UNet call has two). With frozen weights, a backward pass
is about as much again."""


@dataclass(frozen=True)
class Settings:
    """What is the same in every row."""

    models: Models
    scratch: Path
    steps: int
    eta: float
    guidance: float
    rounds: int
    tiny: bool
    profile: bool = False
    levels: tuple[str, ...] | None = None
    rivals: tuple[str, ...] | None = None
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def backprop(self, row: Row) -> dict[str, Any]:
        """Return a row's `backprop` section, with fewer steps where the model is tiny."""
        section = dict(row.backprop)
        if "k" in section:
            section["k"] = max(1, min(self.steps, section["k"] * self.steps // 50))
        return section

    def pixels(self, row: Row) -> int:
        """Return a row's image size."""
        return row.size // 8 if self.tiny else row.size


class Side(Protocol):
    """Something that can do a training step."""

    def step(self, kept: int) -> None:
        """Train one step in which the last `kept` denoising steps keep their gradient."""


@contextmanager
def unchanged_tf32() -> Iterator[None]:
    """Restore the global TF32 switch, which TRL turns on, for the other sides."""
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class TrlSide:
    """TRL's trainer, unchanged, on its own copy of the pipeline."""

    def __init__(self, settings: Settings, row: Row) -> None:
        accelerate.PartialState()  # TRL logs through accelerate while it is being imported.
        from trl import AlignPropConfig, AlignPropTrainer
        from trl.models import DefaultDDPOStableDiffusionPipeline

        models, self.steps = settings.models, settings.steps
        self.config = AlignPropConfig(
            mixed_precision="bf16" if models.dtype == torch.bfloat16 else "no",
            sample_num_steps=self.steps,
            sample_guidance_scale=settings.guidance,
            sample_eta=settings.eta,
            train_batch_size=row.batch,
            train_learning_rate=LEARNING_RATE,
            truncated_backprop_rand=False,
            accelerator_kwargs={"cpu": models.device.type == "cpu"},
        )
        texts = itertools.cycle(PROMPTS)
        # TRL loads from a folder; a copy that shares its weights saves the time, and the memory of a second model.
        loaded = patch.object(diffusers.StableDiffusionPipeline, "from_pretrained", return_value=models.copy())
        with tempfile.TemporaryDirectory() as folder, loaded:
            pipeline = DefaultDDPOStableDiffusionPipeline(folder, use_lora=True)
        with unchanged_tf32():
            self.trainer = AlignPropTrainer(self.config, models.score, lambda: (next(texts), {}), pipeline)
        pipeline.set_progress_bar_config(disable=True)
        self.done = 0

    def step(self, kept: int) -> None:
        """See `Side`."""
        self.config.truncated_backprop_timestep = self.steps - kept
        with unchanged_tf32():
            torch.backends.cuda.matmul.allow_tf32 = self.config.allow_tf32
            self.done = self.trainer.step(0, self.done)  # TRL writes no checkpoint in epoch 0.


class PlainSide:
    """A plain loop on diffusers' scheduler and UNet: no graph before the kept steps, each of which is checkpointed."""

    def __init__(self, settings: Settings, row: Row) -> None:
        self.settings, self.batch = settings, row.batch
        self.pipeline = settings.models.copy()
        self.unet = self.pipeline.unet
        self.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        self.parameters = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        for parameter in self.parameters:
            parameter.data = parameter.data.float()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE)
        self.texts = itertools.cycle(PROMPTS)

    def _encode(self, texts: Sequence[str]) -> Tensor:
        tokenizer = self.pipeline.tokenizer
        tokens = tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        )
        embedded: Tensor = self.pipeline.text_encoder(tokens.input_ids.to(self.settings.models.device))[0]
        return embedded

    def _predict(self, latents: Tensor, timestep: Tensor, embeddings: Tensor) -> Tensor:
        """Return the guided prediction, (B, C, h, w)."""
        both = self.unet(torch.cat([latents, latents]), timestep, encoder_hidden_states=embeddings).sample
        without, conditioned = both.float().chunk(2)
        guided: Tensor = without + self.settings.guidance * (conditioned - without)
        return guided

    def _decode(self, latents: Tensor) -> Tensor:
        images = self.pipeline.vae.decode(latents / self.pipeline.vae.config.scaling_factor).sample.float()
        clipped: Tensor = (images / 2 + 0.5).clamp(0, 1)
        return clipped

    def step(self, kept: int) -> None:
        """See `Side`."""
        device, dtype = self.settings.models.device, self.settings.models.dtype
        scheduler, first = self.pipeline.scheduler, self.settings.steps - kept
        scheduler.set_timesteps(self.settings.steps)
        texts = [next(self.texts) for _ in range(self.batch)]
        size = self.unet.config.sample_size
        latents = torch.randn(self.batch, 4, size, size, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            with torch.no_grad():
                embeddings = self._encode([""] * self.batch + texts)
            for i, timestep in enumerate(scheduler.timesteps):
                with torch.set_grad_enabled(i >= first):
                    predict = self._predict if i < first else partial(checkpoint, self._predict, use_reentrant=False)
                    prediction = predict(latents, timestep, embeddings)
                    latents = scheduler.step(prediction, timestep, latents, eta=self.settings.eta).prev_sample
            decoded = [checkpoint(self._decode, one, use_reentrant=False) for one in torch.split(latents, 1)]
        scores, _ = self.settings.models.score(torch.cat(decoded), texts, None)
        torch.autograd.backward(-scores.mean())
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def our_config(settings: Settings, row: Row, seed: int, level: str) -> tuple[RunConfig, Registry]:
    """Return a row's run config at a level, and the registry that knows its rewards.

    Raises:
        ConfigError: the run config has no such key or value.
    """
    models = settings.models
    rewards = {f"clip_{n}": reward for n, reward in enumerate(models.rewards)}
    registry = default_registry().with_rewards(rewards)
    side = settings.pixels(row)
    sections: dict[str, Any] = {
        "model": {"base": base_of(models.pipeline, registry)},
        "prompts": {"train": PROMPTS},
        "sampling": {
            "steps": settings.steps,
            "guidance_scale": settings.guidance,
            "eta": settings.eta,
            "width": side,
            "height": side,
        },
        "backprop": settings.backprop(row),
        "lora": {"rank": RANK},
        "optimizer": {"learning_rate": LEARNING_RATE},
        "rewards": [{"name": name} for name in rewards],
        "training": {
            "batch_size": row.batch,
            "seed": seed,
            "device": models.device.type,
            "mixed_precision": "bf16" if models.dtype == torch.bfloat16 else "no",
        },
        "output": str(settings.scratch / f"run{next(settings.numbers)}"),
    }
    for name, changes in LEVELS[level].items():
        sections[name] = {**sections.get(name, {}), **changes}
    return load_config(sections, registry=registry), registry


class OurSide:
    """alignprop's trainer, built as `ap.train` builds it."""

    def __init__(self, settings: Settings, config: RunConfig, registry: Registry) -> None:
        self.trainer = Trainer(config, registry=registry, pipeline=settings.models.copy())
        self.trainer.prepare()
        print(f"alignprop: {self.trainer.costs}", flush=True)

    def step(self, kept: int) -> None:
        """See `Side`; the trainer draws the same number itself."""
        stats = self.trainer.step()
        assert stats.kept_steps == kept, (stats.kept_steps, kept)
        if stats.skipped is not None:
            raise RuntimeError(f"the optimizer step was skipped: {stats.skipped}")


def kept_steps(settings: Settings, row: Row) -> tuple[int, list[int]]:
    """Return a seed, and the number of kept steps of each step that every side runs with it.

    Where the number is random, the seed's counted steps spread as evenly over 1..steps as that of any seed tried.
    """
    counted = [(i + 0.5) * settings.steps / settings.rounds for i in range(settings.rounds)]
    backprop = BackpropConfig.model_validate(settings.backprop(row))

    def drawn(seed: int) -> list[int]:
        sizes = [1.0] * settings.steps  # they decide weights, not the number of steps
        steps = range(settings.rounds + 3)  # first step, step for memory, rounds, step under the profiler
        return [len(draw_truncation(backprop, sizes, seed=seed, step=i).kept) for i in steps]

    def unevenness(seed: int) -> float:
        chosen = sorted(drawn(seed)[2 : 2 + settings.rounds])
        return sum(abs(a - b) for a, b in zip(chosen, counted, strict=True))

    seed = min(range(1000), key=unevenness) if backprop.strategy in ("uniform", "gaussian", "bernoulli") else 0
    return seed, drawn(seed)


def builders(settings: Settings, name: str, row: Row, seed: int) -> dict[str, Callable[[], Side]]:
    """Return the functions that build a row's sides, rivals first: they keep nothing on the GPU between steps.

    Empty if the run config refuses all of the row's levels.
    """
    rivals: dict[str, Callable[[], Side]] = {
        "trl": partial(TrlSide, settings, row),
        "plain": partial(PlainSide, settings, row),
    }
    ours: dict[str, Callable[[], Side]] = {}
    for level in row.levels if settings.levels is None else settings.levels:
        try:
            ours[f"alignprop {level}"] = partial(OurSide, settings, *our_config(settings, row, seed, level))
        except ConfigError as error:
            print(f"{name}, alignprop {level}: skipped, the run config refuses it: {error}", flush=True)
    chosen = row.rivals if settings.rivals is None else settings.rivals
    return {rival: rivals[rival] for rival in chosen} | ours if ours else {}


def prepare(name: str, side: str, make: Callable[[], Side], kept: Sequence[int]) -> tuple[Side, Measurement]:
    """Build a side and run its first two steps; returns it with what is known so far."""
    found = Measurement(built_gib=gpu_measure.free())
    built: list[Side] = []
    found.build_seconds = gpu_measure.seconds_of(lambda: built.append(make()))
    first, second = (partial(built[0].step, number) for number in kept[:2])
    _, found.first_peak_gib, _, found.first_seconds = gpu_measure.memory_of(first)
    found.before_gib, found.peak_gib, found.allocated_gib, _ = gpu_measure.memory_of(second)
    print(
        f"{name}, {side}: built in {found.build_seconds:.1f} s, first step {found.first_seconds:.2f} s, "
        f"{found.before_gib:.2f} GiB before the second step, peak {found.peak_gib:.2f} GiB",
        flush=True,
    )
    return built[0], found


def failure(name: str, side: str, error: Exception) -> dict[str, Any]:
    """Print the traceback of a side's error; returns the record of it."""
    traceback.print_exception(error)
    return {"kind": "failed", "row": name, "side": side, "error": f"{type(error).__name__}: {error}"}


def run(settings: Settings, name: str, row: Row) -> Iterator[dict[str, Any]]:
    """Measure a row; yields a result per side. A side that fails is reported and left out."""
    settings.models.use_rewards(row.rewards)
    seed, kept = kept_steps(settings, row)
    sides: dict[str, Side] = {}
    measured: dict[str, Measurement] = {}
    for side, make in builders(settings, name, row, seed).items():
        try:
            sides[side], measured[side] = prepare(name, side, make, kept)
        except Exception as error:  # out of memory, or TRL is missing: the other sides' numbers remain of use
            yield failure(name, side, error)
    for i in range(settings.rounds):
        for side in list(sides) if i % 2 == 0 else list(reversed(sides)):
            try:
                seconds = gpu_measure.seconds_of(partial(sides[side].step, kept[2 + i]))
            except Exception as error:
                yield failure(name, side, error)
                del sides[side], measured[side]
                continue
            measured[side].seconds.append(seconds)
            print(f"{name}, {side}: kept {kept[2 + i]}, {seconds:.3f} s", flush=True)
    for side, found in measured.items():
        if settings.profile:
            found.profile = gpu_measure.profile(partial(sides[side].step, kept[2 + settings.rounds]))
            print(f"{name}, {side}: {found.profile}", flush=True)
        yield {
            "kind": "result",
            "row": name,
            "title": row.title,
            "side": side,
            "batch": row.batch,
            "size": settings.pixels(row),
            "rewards": row.rewards,
            "strategy": row.backprop["strategy"],
            "kept": kept[2 : 2 + settings.rounds],
            "median_s": statistics.median(found.seconds),
            **found.as_json(),
        }


def useful_tflop(steps: int, result: Mapping[str, Any]) -> float:
    """Return the TFLOP of a step without recomputation: every forward pass once, and the backward passes."""
    unet = 2 * (steps + statistics.mean(result["kept"])) * UNET_TFLOP
    return float(result["batch"] * (unet + 2 * DECODE_TFLOP))


def judge(machine: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return every goal with what was measured, for the rows that ran."""
    found: list[dict[str, Any]] = []
    rate = machine["matmul_tflops"]
    for name, row in ROWS.items():
        own = [result for result in results if result["row"] == name]
        for bar in row.bars:
            side = f"alignprop {bar.level or row.levels[0]}"
            ours = next((result for result in own if result["side"] == side), None)
            if ours is None:
                continue
            rival = next((result for result in own if result["side"] == bar.to), None)
            others = [result for result in results if result["row"] == bar.to]
            other = rival or next(iter(others), None)
            value: float | None = None
            if bar.measure == "useful" and rate:
                value = useful_tflop(machine["steps"], ours) / ours["median_s"] / rate
            elif not bar.to:
                value = ours["median_s"] if bar.measure == "seconds" else gpu_report.own_gib(ours, own)
            elif other is not None and bar.measure == "gib":
                theirs = gpu_report.own_gib(other, own if rival else others)
                value = gpu_report.own_gib(ours, own) / theirs if theirs else None
            elif rival is not None:
                value = gpu_report.time_ratio(ours, rival)
            elif other is not None:
                value = ours["median_s"] / other["median_s"]
            if value is None:
                continue
            met = value >= bar.limit if bar.measure == "useful" else value <= bar.limit
            goal = {"measure": bar.measure, "limit": bar.limit, "to": bar.to, "value": value, "met": met}
            found.append({"kind": "goal", "row": name, "side": ours["side"], **goal})
    return found


def names(text: str) -> list[str]:
    """Return the row names of a comma-separated list with groups."""
    chosen = [row for name in text.split(",") for row in GROUPS.get(name, (name,))]
    for name in chosen:
        if name not in GROUPS["all"]:
            raise argparse.ArgumentTypeError(f'"{name}" is none of {", ".join((*GROUPS, *GROUPS["all"]))}')
    return list(dict.fromkeys(chosen))


def choice(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Return a parser of comma-separated names; an empty text is none."""

    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(part for part in text.split(",") if part)
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f'"{name}" is none of {", ".join(known)}')
        return chosen

    return parse


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=names, default=names("all"), help=f"of: {', '.join((*GROUPS, *GROUPS['all']))}")
    parser.add_argument("--levels", type=choice(tuple(LEVELS)), help="instead of each row's own levels of alignprop")
    parser.add_argument("--rivals", type=choice(BOTH), help='instead of each comparison\'s own; "" is none')
    parser.add_argument("--rounds", type=int, default=3, help="counted steps per side")
    parser.add_argument("--steps", type=int, help="denoising steps; 50, or 4 with --tiny")
    parser.add_argument("--eta", type=float, default=1.0, help="DDIM eta; TRL's default is 1")
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--gib", type=float, help="let the process use only so much of the GPU's memory")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to test the script")
    parser.add_argument("--profile", action="store_true", help="one more step per side under torch.profiler")
    parser.add_argument("--json", type=Path, help="file for the results, one JSON object per line, written row by row")
    parser.add_argument("--output", type=Path, help="Markdown page to write")
    parser.add_argument("--plot", type=Path, help="folder for PNG files")
    parser.add_argument(
        "--report", type=Path, nargs="+", help="measure nothing; page and plots of the results in these files"
    )
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if not (options.tiny or options.report) and not torch.cuda.is_available():
        parser.error("needs a CUDA GPU; --tiny tests the script without one")
    options.steps = options.steps or (4 if options.tiny else 50)
    options.command = list(sys.argv[1:] if argv is None else argv)
    return options


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Run the chosen rows; returns the records by kind, each written to `--json` as soon as it is known."""
    records: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}

    def record(entry: dict[str, Any]) -> None:
        records[entry["kind"]].append(entry)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            with options.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.gib:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.gib * 2**30 / total))
    rows = {name: ROWS[name] for name in options.rows if name in ROWS}
    needs_rate = any(bar.measure == "useful" for row in rows.values() for bar in row.bars)
    rate = gpu_measure.matmul_rate() if needs_rate else 0.0
    record({**gpu_report.machine(options, device), "matmul_tflops": rate})
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # of TRL and diffusers
            warnings.simplefilter("ignore", category)
        settings = Settings(
            models=Models(device, tiny=options.tiny),
            scratch=Path(scratch),
            steps=options.steps,
            eta=options.eta,
            guidance=options.guidance,
            rounds=options.rounds,
            tiny=options.tiny,
            profile=options.profile,
            levels=options.levels,
            rivals=options.rivals,
        )
        for name, row in rows.items():
            for entry in run(settings, name, row):
                record(entry)
        # Sweeps have no rivals. A point that several have in common is measured once.
        alone, known = replace(settings, rivals=()), dict[str, list[dict[str, Any]]]()
        for name in options.rows:
            label, points = SWEEPS.get(name, ("", {}))
            for x, row in points.items():
                key = json.dumps([settings.backprop(row), row.batch, row.size, row.rewards])
                if key not in known:
                    known[key] = list(run(alone, f"{name} {x:g}", row))
                for entry in known[key]:
                    failed = entry["kind"] == "failed"
                    record({**entry, "row": name, "x": x} | ({} if failed else {"kind": "point", "title": label}))
    return records


def read(files: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """Read the records of earlier runs by kind, row by row in the order of the tables.

    Only sides that alternated in one run are compared, so a later run's row replaces that of an earlier one.
    """
    machines: list[dict[str, Any]] = []
    rows: dict[str, tuple[int, list[dict[str, Any]]]] = {}
    for line in itertools.chain.from_iterable(file.read_text(encoding="utf-8").splitlines() for file in files):
        entry = json.loads(line)
        if entry["kind"] == "machine":  # starts a run
            machines.append(entry)
            continue
        number, entries = rows.get(entry["row"], (0, []))
        rows[entry["row"]] = (len(machines), [*entries, entry] if number == len(machines) else [entry])
    found = [entry for name in GROUPS["all"] if name in rows for entry in rows[name][1]]
    return {"machine": machines} | {kind: [entry for entry in found if entry["kind"] == kind] for kind in KINDS[1:]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen rows; exit 1 if one misses a goal."""
    options = arguments(argv)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    if options.report:
        records = read(options.report)
        machine = records["machine"][-1]
        machine["matmul_tflops"] = max(record["matmul_tflops"] for record in records["machine"])
        machine["command"] = " && ".join(dict.fromkeys(record["command"] for record in records["machine"]))
    else:
        records = measure(options)
        (machine,) = records["machine"]
    results = [*records["result"], *records["point"]]
    goals = [] if machine["tiny"] else judge(machine, results)
    plots = os.path.relpath(options.plot, options.output.parent) if options.plot and options.output else ""
    page = gpu_report.page(machine, results, goals, plots)
    print(page)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(page, encoding="utf-8")
    if options.plot:
        gpu_report.plot(results, options.plot)
    problems = [f"{goal['row']} ({goal['measure']}) missed its goal" for goal in goals if not goal["met"]]
    problems += [f"{failed['row']}, {failed['side']}: {failed['error']}" for failed in records["failed"]]
    for problem in problems:
        print(problem)
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
