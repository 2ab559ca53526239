"""Sampling by definition, for comparison: no truncation tricks, no checkpointing, no chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from alignprop_core.config.model import SamplingConfig
from alignprop_core.diffusion.noise import Noise
from alignprop_core.diffusion.truncation import Truncation


def plain_autograd(
    pipe: Any, prompts: Sequence[str], sampling: SamplingConfig, noise: Noise, plan: Truncation
) -> Tensor:
    """Return the images by definition: diffusers' scheduler and UNet, a graph through all steps, detach by hand."""
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(sampling.steps)
    count = len(prompts)
    positive, negative = pipe.encode_prompt(list(prompts), "cpu", 1, True, [sampling.negative_prompt] * count)
    context = torch.cat([negative, positive]).detach()

    def network(latents: Tensor, t: Tensor) -> Tensor:
        uncond, cond = pipe.unet(torch.cat([latents] * 2), t, encoder_hidden_states=context).sample.chunk(2)
        return uncond + sampling.guidance_scale * (cond - uncond)

    latents = noise.initial
    for i, t in enumerate(scheduler.timesteps):
        weight, scale = plan.factors.get(i, (0.0, 0.0))
        prediction = network(scale * latents + (1 - scale) * latents.detach(), t)
        prediction = prediction.detach() + weight * (prediction - prediction.detach())
        if i < plan.first:
            latents = latents.detach()
        extra = {} if noise.steps is None else {"eta": sampling.eta, "variance_noise": noise.steps[i]}
        result = scheduler.step(prediction, t, latents, **extra)
        if i == plan.stop_at:
            latents = result.pred_original_sample
            break
        latents = result.prev_sample
    rows = [latents]
    for fresh in () if noise.lv is None else noise.lv:
        t = scheduler.timesteps[-1]
        again = scheduler.add_noise(latents.detach(), fresh, t.repeat(count))
        rows.append(scheduler.step(network(again, t), t, again).prev_sample)
    pixels = pipe.vae.decode(torch.cat(rows) / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    # Straight-through clip: the value of clamp, the gradient of identity.
    return pixels + (pixels.clamp(0, 1) - pixels).detach()
