"""Regularization toward the base model: its value and its full gradient, against plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alignprop_core.config.model import BackpropConfig, SamplingConfig
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.diffusion.truncation import Truncation, draw_truncation
from alignprop_core.lora import adapters as lora

PROMPTS = ["a fox", "two owls"]
STEPS = 4
WEIGHT = 0.7


def tuned(pipe: Any) -> list[torch.nn.Parameter]:
    parameters = lora.attach(pipe.unet, rank=3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters[1::2]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return parameters


def gradients(parameters: list[torch.nn.Parameter]) -> Tensor:
    flat = torch.cat([p.grad.flatten() if p.grad is not None else p.new_zeros(p.numel()) for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return flat


def plain(pipe: Any, base: Any, sampling: SamplingConfig, noise: Any, plan: Truncation) -> tuple[Tensor, Tensor]:
    """Return latents and penalty computed naively: every prediction with its graph, the base model's too."""
    here, there = Sampler(pipe, sampling), Sampler(base, sampling)
    one, two = here.conditioning(PROMPTS), there.conditioning(PROMPTS)
    latents, penalties, state = noise.initial, [], here.scheduler.initial_state
    for i in range(STEPS):
        t = here.scheduler.timesteps[i]
        weight, scale = plan.factors.get(i, (0.0, 0.0))
        seen = scale * latents + (1 - scale) * latents.detach()
        prediction = here.family.predict(seen, t, one)
        if i in plan.kept:
            difference = prediction - there.family.predict(seen, t, two)
            penalties.append(difference.square().flatten(1).mean(1).sum())
        prediction = prediction.detach() + weight * (prediction - prediction.detach())
        if i < plan.first:
            prediction, latents = prediction.detach(), latents.detach()
        if i == plan.stop_at:
            latents = here.scheduler.clean(latents, prediction, i)
            break
        latents, state = here.scheduler.step(latents, prediction, i, state, None)
    return latents, torch.stack(penalties).mean()


@pytest.mark.parametrize("strategy", ["uniform", "full", "drtune", "refl", "bernoulli", "bridge", "leap"])
@pytest.mark.parametrize(
    ("sums_weights", "checkpointing"),
    [
        (True, True),
        (False, False),
        pytest.param(True, False, marks=pytest.mark.slow),
        pytest.param(False, True, marks=pytest.mark.slow),
    ],
)
def test_the_gradient_equals_plain_autograd(
    tiny_sd: Callable[..., Any], strategy: str, sums_weights: bool, checkpointing: bool
) -> None:
    pipe, base = tiny_sd().to(torch.float64), tiny_sd().to(torch.float64)
    base.unet.requires_grad_(False)
    parameters = tuned(pipe)
    sampling = SamplingConfig(steps=STEPS, guidance_scale=2.0)
    options = {"k": 2} if strategy == "drtune" else {}
    backprop = BackpropConfig(strategy=strategy, checkpoint_steps=checkpointing, **options)  # type: ignore[arg-type]
    sampler = Sampler(pipe, sampling, backprop, regularization=WEIGHT)
    assert sampler.engine.calls.forwards_of(pipe.unet)
    if not sums_weights:
        sampler.engine.calls.forwards_of = lambda network, weights=None: {}
    for step in range(2):
        noise = sampler.noise(PROMPTS, seed=3, step=step)
        ascent = torch.randn(noise.initial.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        latents, penalty = plain(
            pipe, base, sampling, noise, draw_truncation(backprop, sampler.step_sizes, seed=3, step=step)
        )
        ((latents * ascent).sum() + 0.5 * WEIGHT * penalty).backward()
        expected = gradients(parameters)

        out = sampler.sample(PROMPTS, noise)
        torch.testing.assert_close(out.aux["regularization"], WEIGHT * penalty, rtol=1e-9, atol=0)
        sampler.backward(out, ascent, aux_scale=0.5)
        torch.testing.assert_close(gradients(parameters), expected, rtol=1e-6, atol=1e-9 * float(expected.norm()))


def test_the_gradient_is_the_same_with_checkpointing_inside_the_network(tiny_sd: Callable[..., Any]) -> None:
    pipe = tiny_sd().to(torch.float64)
    parameters = tuned(pipe)
    sampling = SamplingConfig(steps=STEPS, guidance_scale=2.0)
    found = []
    for recomputes in (False, True):
        if recomputes:
            pipe.unet.enable_gradient_checkpointing()
            pipe.unet.train()  # diffusers recomputes in training mode only; nothing here behaves otherwise in it
        sampler = Sampler(pipe, sampling, BackpropConfig(strategy="full"), regularization=WEIGHT)
        out = sampler.sample(PROMPTS, sampler.noise(PROMPTS, seed=3, step=0))
        sampler.backward(out, torch.zeros_like(out.latents))
        found.append(gradients(parameters))
    assert found[0].norm() > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-12)


def test_zero_adapters_have_no_penalty_and_chunks_add_up(tiny_sd: Callable[..., Any]) -> None:
    pipe = tiny_sd().to(torch.float64)
    fresh = lora.attach(pipe.unet, rank=3, dtype=torch.float64)
    sampler = Sampler(pipe, SamplingConfig(steps=STEPS, guidance_scale=2.0), regularization=WEIGHT)
    noise = sampler.noise(PROMPTS, seed=3, step=1)
    assert sampler.sample(PROMPTS, noise).aux["regularization"].detach() < 1e-20
    with torch.no_grad():
        for parameter in fresh[1::2]:
            parameter.fill_(0.05)
    whole = sampler.sample(PROMPTS, noise).aux["regularization"]
    parts = [sampler.sample(PROMPTS[i : i + 1], noise[i : i + 1]).aux["regularization"] for i in range(2)]
    torch.testing.assert_close(parts[0] + parts[1], whole)
    with torch.no_grad():
        assert not sampler.sample(PROMPTS, noise).aux, "an evaluation pays nothing for it"


def test_frozen_loras_belong_to_the_base_model(tiny_sd: Callable[..., Any], tmp_path: Any) -> None:
    other = tiny_sd().to(torch.float64)
    tuned(other)
    lora.save(other.unet, tmp_path, name="other", dtype=torch.float64)
    pipe = tiny_sd().to(torch.float64)
    lora.attach_frozen(pipe, tmp_path / "other.safetensors", dtype=torch.float64)
    lora.attach(pipe.unet, rank=3, dtype=torch.float64)
    sampler = Sampler(pipe, SamplingConfig(steps=STEPS, guidance_scale=2.0), regularization=WEIGHT)
    out = sampler.sample(PROMPTS, sampler.noise(PROMPTS, seed=3, step=1))
    assert out.aux["regularization"].detach() < 1e-20
