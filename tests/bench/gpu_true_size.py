"""Train models of true size on one GPU, with random weights in bfloat16: seconds of a step, and memory.

    python -m tests.bench.gpu_true_size sdxl sd35_medium flux_dev flux2_klein_4b z_image
    python -m tests.bench.gpu_true_size sdxl_vs_plain       # one step of alignprop and one of plain autograd
    python -m tests.bench.gpu_true_size --tiny sdxl         # the script itself, on a CPU

A step is everything from prompts to updated adapters: denoising, decoding one image at a time, the gradient of a reward
of CLIP ViT-H/14's size, the backward pass through the kept steps, AdamW. `sdxl_vs_plain` compares with the plain way: a
loop over the UNet and diffusers' scheduler with a graph through the kept steps, the blocks of UNet and VAE recomputed
(`enable_gradient_checkpointing`), at 30 steps, of which the last 4 are kept. Both sides train the same adapters with
the same weights and reward, and their steps alternate. Results go to true_size.jsonl in $OUT, or --out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor

from alignprop_core.config.model import BackpropConfig, SamplingConfig
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.lora import adapters
from alignprop_core.reward import ImageBatch
from tests.bench.gpu_measure import GIB, free, on_gpu, seconds_of
from tests.bench.gpu_true_models import MODELS, build, clip_reward

PROMPTS = ("a fox in the snow", "three owls on a blue hill", "a red bicycle", "a city in the rain at night")
RANK = 16
GUIDANCE = {"sdxl": 5.0, "sd35_medium": 4.5, "flux_dev": 3.5, "flux2_klein_4b": 1.0, "z_image": 1.0}
"""As the models' authors use them; FLUX.1 [dev] reads the scale as an input, the two last are distilled."""


class Ours:
    """A training step by alignprop.

    Args:
        pipeline: with adapters attached.
        reward: scores images.
        sampling: the settings.
        kept: the last steps keep their gradient.
        batch: images of a step.
    """

    def __init__(self, pipeline: Any, reward: Any, sampling: SamplingConfig, kept: int, batch: int) -> None:
        self.reward, self.prompts, self.count = reward, (PROMPTS * batch)[:batch], 0
        self.sampler = Sampler(pipeline, sampling, BackpropConfig(strategy="last_k", k=kept))
        self.parameters = self.sampler.trainable_parameters()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        self.norm = torch.tensor(0.0)

    def __call__(self) -> None:
        """Take a step."""
        self.count += 1
        noise = self.sampler.noise(self.prompts, seed=0, step=self.count)
        out = self.sampler.sample(self.prompts, noise)
        gradients = []
        for row in range(len(out.latents)):
            latents = out.latents[row : row + 1].detach().requires_grad_()
            score = self.reward(ImageBatch(images=self.sampler.decode(latents), prompts=self.prompts[row : row + 1]))
            gradients.append(torch.autograd.grad(-score.mean() / len(self.prompts), latents)[0])
        self.sampler.backward(out, torch.cat(gradients))
        self.norm = update(self.optimizer, self.parameters)


class Plain:
    """The same step of Stable Diffusion XL by plain autograd; arguments as of `Ours`."""

    def __init__(self, pipeline: Any, reward: Any, sampling: SamplingConfig, kept: int, batch: int) -> None:
        self.pipeline, self.reward, self.sampling, self.kept = pipeline, reward, sampling, kept
        self.prompts = (PROMPTS * batch)[:batch]
        self.parameters = adapters.parameters(pipeline.unet)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        self.norm = torch.tensor(0.0)

    def __call__(self) -> None:
        """Take a step."""
        unet, vae = self.pipeline.unet, self.pipeline.vae
        unet.enable_gradient_checkpointing()
        vae.enable_gradient_checkpointing()
        try:
            score = self.reward(ImageBatch(images=self._images(unet, vae), prompts=self.prompts))
            torch.autograd.backward(-score.mean())
        finally:
            unet.disable_gradient_checkpointing()
            vae.disable_gradient_checkpointing()
        self.norm = update(self.optimizer, self.parameters)

    def _images(self, unet: Any, vae: Any) -> Tensor:
        scheduler, steps, side = self.pipeline.scheduler, self.sampling.steps, int(unet.config.sample_size)
        pixels = side * self.pipeline.vae_scale_factor
        with torch.no_grad():
            positive, negative, pooled, negative_pooled = self.pipeline.encode_prompt(
                list(self.prompts), device=unet.device, do_classifier_free_guidance=True
            )
        sizes = positive.new_tensor([pixels, pixels, 0, 0, pixels, pixels]).repeat(2 * len(self.prompts), 1)
        added = {"text_embeds": torch.cat([negative_pooled, pooled]), "time_ids": sizes}
        texts = torch.cat([negative, positive])
        latents = torch.randn(len(self.prompts), 4, side, side, device=unet.device)
        scheduler.set_timesteps(steps)
        for i, timestep in enumerate(scheduler.timesteps):
            with torch.set_grad_enabled(i >= steps - self.kept):
                both = torch.cat([latents, latents]).to(unet.dtype)
                output = unet(both, timestep, encoder_hidden_states=texts, added_cond_kwargs=added).sample.float()
                without, conditioned = output.chunk(2)
                prediction = without + self.sampling.guidance_scale * (conditioned - without)
                latents = scheduler.step(prediction, timestep, latents).prev_sample
        images: Tensor = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample.float()
        return (images / 2 + 0.5).clamp(0, 1)


def update(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Tensor:
    """Update the adapters; return the gradient's norm."""
    norm: Tensor = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def settings_of(name: str, options: argparse.Namespace, steps: int) -> SamplingConfig:
    """Return the sampling settings of a model."""
    side = 32 if options.tiny else options.side
    return SamplingConfig(steps=steps, guidance_scale=GUIDANCE[name], width=side, height=side)


def prepared(name: str, options: argparse.Namespace) -> tuple[Any, Any]:
    """Return a pipeline with adapters, and the reward."""
    device = torch.device("cuda" if on_gpu() and not options.tiny else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipeline = build(name, device, dtype, tiny=options.tiny)
    network = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    adapters.attach(network, rank=RANK)
    return pipeline, clip_reward(device, dtype, tiny=options.tiny)


def first(make: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Build a side and take its first step, which may capture; return it and what that cost."""
    before = free()
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    side = make()
    seconds = seconds_of(side)
    peak = torch.cuda.max_memory_reserved() / GIB if on_gpu() else 0.0
    allocated = torch.cuda.max_memory_allocated() / GIB if on_gpu() else 0.0
    return side, {"first_s": seconds, "before_gib": before, "peak_gib": peak, "peak_allocated_gib": allocated}


def train(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train one model for some steps."""
    pipeline, reward = prepared(name, options)
    network = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    settings = settings_of(name, options, options.steps)
    side, costs = first(lambda: Ours(pipeline, reward, settings, options.kept, options.batch))
    seconds = [seconds_of(side) for _ in range(options.rounds)]
    return {
        "billions": sum(p.numel() for p in network.parameters()) / 1e9,
        "graphs": side.sampler.engine.pool.enabled,
        "level": str(side.sampler.memory.level(options.batch)),
        "gradient_norm": float(side.norm),
        "seconds": seconds,
        "median_s": statistics.median(seconds),
        **costs,
        "steps": options.steps,
        "kept": options.kept,
    }


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Compare Stable Diffusion XL's steps with plain autograd's."""
    pipeline, reward = prepared(name, options)
    steps, kept = (4, 2) if options.tiny else (30, 4)
    settings = settings_of(name, options, steps)
    plain, plain_costs = first(lambda: Plain(pipeline, reward, settings, kept, options.batch))
    ours, our_costs = first(lambda: Ours(pipeline, reward, settings, kept, options.batch))
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    for _ in range(options.rounds):
        seconds["plain"].append(seconds_of(plain))
        seconds["ours"].append(seconds_of(ours))
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        "seconds": seconds,
        "medians_s": medians,
        "ratio": medians["ours"] / medians["plain"],
        "ours": {**our_costs, "gradient_norm": float(ours.norm), "graphs": ours.sampler.engine.pool.enabled},
        "plain": {**plain_costs, "gradient_norm": float(plain.norm)},
        "steps": steps,
        "kept": kept,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the models one after another; a failure is recorded and does not stop the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=[*MODELS, "sdxl_vs_plain"])
    parser.add_argument("--tiny", action="store_true", help="tiny networks, on the CPU")
    parser.add_argument("--side", type=int, default=1024, help="pixels")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps; sdxl_vs_plain always has 30")
    parser.add_argument("--kept", type=int, default=2, help="last steps that keep their gradient")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2, help="steps after the first")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "build")))
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    failures = 0
    for model in options.models:
        try:
            result = compare("sdxl", options) if model == "sdxl_vs_plain" else train(model, options)
        except Exception as error:  # the next model may still fit
            traceback.print_exc()
            result, failures = {"error": f"{type(error).__name__}: {error}"}, failures + 1
        free()
        entry = {"model": model, "side": options.side, "batch": options.batch, "tiny": options.tiny, **result}
        print(json.dumps(entry, indent=1), flush=True)
        with (options.out / "true_size.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
