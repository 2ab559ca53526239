"""Compare the adapters' gradient with plain autograd's in float64, at Stable Diffusion 1.5's size on one GPU.

Plain autograd is a loop over diffusers' scheduler and UNet, with a graph through the kept steps. All sides have the
same weights (random, rounded to bfloat16), adapters, noise and objective: a weighted sum of the pixels of one image.

    python -m tests.bench.gpu_gradient --output docs/results/gpu_gradient.md
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alignprop_core.config.model import BackpropConfig, SamplingConfig
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.lora import adapters
from tests.bench.gpu_models import Models

PROMPTS = ["a photo of a fox"]
GUIDANCE = 7.5
LEVELS: dict[str, dict[str, Any]] = {
    "default": {},
    "block checkpointing": {"checkpoint_blocks": True, "checkpoint_decoder": True},
    "without CUDA graphs": {"cuda_graphs": False},
    "compiled blocks": {},
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def pipeline(models: Models, dtype: torch.dtype) -> tuple[Any, list[torch.nn.Parameter]]:
    """Return a pipeline in this dtype and the parameters of its adapter, whose B is not zero."""
    pipe = models.copy().to(dtype)
    full = torch.float64 if dtype == torch.float64 else torch.float32
    parameters = adapters.attach(pipe.unet, rank=4, target_modules=TARGETS, dtype=full, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for b in parameters[1::2]:
            b.copy_(0.02 * torch.randn(b.shape, generator=generator))
    return pipe, parameters


def objective(images: Tensor) -> Tensor:
    """Return a sum in which every pixel counts differently."""
    weights = torch.linspace(-40, 40, images.numel(), dtype=torch.float64, device=images.device).sin()
    total: Tensor = (weights.to(images).view_as(images) * images).sum()
    scaled: Tensor = total / images.numel() ** 0.5
    return scaled


def flat(parameters: Sequence[torch.nn.Parameter]) -> Tensor:
    """Return the gradients as one float64 vector."""
    return torch.cat([p.grad.flatten().double() for p in parameters if p.grad is not None])


def plain(models: Models, dtype: torch.dtype, steps: int, kept: int) -> Tensor:
    """Return plain autograd's gradient; half precision runs under autocast, as trainers do."""
    pipe, parameters = pipeline(models, dtype)
    scheduler, unet = pipe.scheduler, pipe.unet
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        embeddings = torch.cat(pipe.encode_prompt(PROMPTS, unet.device, 1, True, [""])[::-1])
    latents = noise(models, pipe, steps).initial.to(unet.device)

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        inputs = torch.cat([latents] * 2).to(dtype)
        uncond, cond = unet(inputs, timestep, encoder_hidden_states=embeddings).sample.to(latents.dtype).chunk(2)
        guided: Tensor = uncond + GUIDANCE * (cond - uncond)
        return guided

    def decode(latents: Tensor) -> Tensor:
        pixels = pipe.vae.decode(latents.to(dtype) / pipe.vae.config.scaling_factor).sample.to(latents.dtype) / 2 + 0.5
        clipped: Tensor = pixels + (pixels.clamp(0, 1) - pixels).detach()
        return clipped

    with torch.autocast(unet.device.type, dtype) if dtype == torch.bfloat16 else nullcontext():
        for i, timestep in enumerate(scheduler.timesteps):
            with torch.set_grad_enabled(i >= steps - kept):
                # One step's activations at a time: those of two do not fit in float64.
                prediction = checkpoint(predict, latents, timestep, use_reentrant=False)
                latents = scheduler.step(prediction, timestep, latents).prev_sample
        loss = objective(checkpoint(decode, latents, use_reentrant=False))
    torch.autograd.backward(loss)
    return flat(parameters)


def noise(models: Models, pipe: Any, steps: int) -> Any:
    """Return the noise of all sides."""
    return Sampler(pipe, SamplingConfig(steps=steps)).noise(PROMPTS, seed=3)


def ours(models: Models, dtype: torch.dtype, steps: int, kept: int, level: str) -> Tensor:
    """Return alignprop's gradient."""
    pipe, parameters = pipeline(models, dtype)
    backprop = BackpropConfig.model_validate({"strategy": "last_k", "k": kept, **LEVELS[level]})
    sampler = Sampler(pipe, SamplingConfig(steps=steps, guidance_scale=GUIDANCE), backprop)
    if level == "compiled blocks":
        sampler.engine.compile()
    out = sampler.sample(PROMPTS, sampler.noise(PROMPTS, seed=3))
    latents = out.latents.detach().requires_grad_()
    (at_latents,) = torch.autograd.grad(objective(sampler.decode(latents)), latents)
    sampler.backward(out, at_latents)
    assert sampler.engine.pool.enabled is (backprop.cuda_graphs and sampler.device.type == "cuda")
    found = flat(parameters)
    sampler.engine.release()
    return found


def sides(levels: Sequence[str]) -> Iterator[tuple[str, torch.dtype, Any]]:
    """Yield name, dtype and function of every side, plain autograd in float64 first."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        yield "plain autograd", dtype, plain
        for level in levels:
            if level != "compiled blocks" or dtype == torch.bfloat16:
                yield f"alignprop, {level}", dtype, partial(ours, level=level)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--kept", type=int, default=2)
    parser.add_argument("--levels", default=",".join(LEVELS))
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to test the script")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    # TensorFloat-32 would hide differences in float32.
    torch.backends.cudnn.allow_tf32 = False
    diffusers.utils.logging.set_verbosity_error()
    models = Models(torch.device("cuda" if torch.cuda.is_available() else "cpu"), tiny=options.tiny)
    command = " ".join(["python", "-m", "tests.bench.gpu_gradient", *(sys.argv[1:] if argv is None else argv)])
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    lines = [
        "# The gradient in float64, float32 and bfloat16",
        "",
        f"Generated by `{command}`.",
        "",
        f"{name}; Python {platform.python_version()}, torch {torch.__version__.partition('+')[0]}, diffusers "
        f"{diffusers.__version__}. Stable Diffusion 1.5 with random weights rounded to bfloat16, one image of 512 "
        f"pixels, {options.steps} DDIM steps, the last {options.kept} kept, guidance {GUIDANCE:g}, rank-4 adapters "
        "with a random B, a weighted sum of pixels as the objective. Plain autograd is a loop over diffusers' "
        "scheduler and UNet, bfloat16 under autocast with float32 adapters. Distance is the norm of the difference "
        "to plain autograd's gradient in float64, as a share of its norm. TensorFloat-32 is off.",
        "",
        "| dtype | side | distance | cosine |",
        "| --- | --- | --- | --- |",
    ]
    exact: Tensor | None = None
    for side, dtype, run in sides([level for level in options.levels.split(",") if level]):
        torch.cuda.empty_cache()
        found = run(models, dtype, options.steps, options.kept)
        exact = found if exact is None else exact
        cosine = torch.nn.functional.cosine_similarity(found, exact, dim=0)
        distance = (found - exact).norm() / exact.norm()
        lines.append(f"| {str(dtype).removeprefix('torch.')} | {side} | {distance:.2e} | {cosine:.6f} |")
        print(lines[-1], flush=True)
    page = "\n".join([*lines, ""])
    if options.output:
        options.output.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
