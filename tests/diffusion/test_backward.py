"""The gradient of a chain step by step: multistep schedulers, the new strategies by their papers, and its limits."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from alignprop_core.config.model import BackpropConfig, SamplingConfig
from alignprop_core.diffusion.memory import graph_bytes
from alignprop_core.diffusion.noise import Noise
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.diffusion.schedulers import DDIM, State, step_sizes
from alignprop_core.diffusion.truncation import Truncation, draw_truncation
from alignprop_core.errors import RunError
from alignprop_core.lora import adapters as lora

PROMPTS = ["a fox", "two owls"]
STEPS = 6


def tuned(tiny_sd: Callable[..., Any], **options: Any) -> tuple[Any, list[torch.nn.Parameter]]:
    """Return a float64 pipeline with an adapter whose B is not zero."""
    pipe = tiny_sd(**options).to(torch.float64)
    parameters = lora.attach(pipe.unet, rank=2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters[1::2]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return pipe, parameters


def taken(parameters: list[torch.nn.Parameter]) -> Tensor:
    """Return the gradients as one vector, and reset them."""
    flat = torch.cat([p.grad.flatten() if p.grad is not None else p.new_zeros(p.numel()) for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return flat


def ascent_of(latents: Tensor) -> Tensor:
    return torch.linspace(-1, 1, latents.numel(), dtype=latents.dtype).view_as(latents).cos()


def close(actual: Tensor, expected: Tensor) -> None:
    assert expected.norm() > 0
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10 * float(expected.norm()))


class TwoStep:
    """A multistep scheduler: every step extrapolates from the last two predictions (Adams-Bashforth)."""

    def __init__(self, inner: DDIM) -> None:
        self.inner, self.timesteps, self.steps, self.needs_noise = inner, inner.timesteps, inner.steps, False
        self.initial_state: State = ()
        self.initial_scale = 1.0

    def step(
        self, latents: Tensor, prediction: Tensor, step: int, state: State, noise: Tensor | None
    ) -> tuple[Tensor, State]:
        mixed = 1.5 * prediction - 0.5 * state[0] if state else prediction
        return self.inner.step(latents, mixed, step, (), noise)[0], (prediction,)

    def slope(self, step: int) -> float | None:
        return None

    def clean(self, latents: Tensor, prediction: Tensor, step: int) -> Tensor:
        return self.inner.clean(latents, prediction, step)

    def renoise(self, latents: Tensor, step: int, noise: Tensor) -> Tensor:
        return self.inner.renoise(latents, step, noise)


def two_step_sampler(pipe: Any, backprop: dict[str, Any]) -> Sampler:
    sampler = Sampler(pipe, SamplingConfig(steps=STEPS, guidance_scale=2.0), BackpropConfig.model_validate(backprop))
    sampler.scheduler = TwoStep(sampler.scheduler)  # type: ignore[assignment,arg-type]
    return sampler


def plain(sampler: Sampler, noise: Noise, truncation: Truncation) -> Tensor:
    """Return the final latents with one graph through the whole chain."""
    conditioning, scheduler = sampler.conditioning(PROMPTS), sampler.scheduler
    latents, state = noise.initial, scheduler.initial_state
    for i, t in enumerate(scheduler.timesteps):
        weight, scale = truncation.factors.get(i, (0.0, 0.0))
        prediction = sampler.family.predict(scale * latents + (1 - scale) * latents.detach(), t, conditioning)
        prediction = prediction.detach() + weight * (prediction - prediction.detach())
        latents, state = scheduler.step(latents, prediction, i, state, None)
    return latents


@pytest.mark.parametrize("stores", [True, False])
@pytest.mark.parametrize(
    "backprop",
    [{"strategy": "last_k", "k": 3}, {"strategy": "full"}, {"strategy": "bernoulli"}, {"strategy": "drtune", "k": 3}],
    ids=lambda settings: settings["strategy"],
)
def test_a_multistep_schedulers_history_carries_gradient(
    tiny_sd: Callable[..., Any], backprop: dict[str, Any], stores: bool
) -> None:
    pipe, parameters = tuned(tiny_sd)
    sampler = two_step_sampler(pipe, {**backprop, "checkpoint_steps": not stores})
    noise = sampler.noise(PROMPTS, seed=2, step=1)
    truncation = draw_truncation(sampler.backprop, sampler.step_sizes, seed=2, step=1)
    latents = plain(sampler, noise, truncation)
    latents.backward(ascent_of(latents))
    expected = taken(parameters)
    out = sampler.sample(PROMPTS, noise)
    torch.testing.assert_close(out.latents, latents, rtol=0, atol=1e-12)
    sampler.backward(out, ascent_of(latents))
    close(taken(parameters), expected)


# -- the papers' own constructions, for flow matching, in which DDIM's latents are divided by their scale --------------


def sigmas_and_scales(sampler: Sampler) -> tuple[list[float], list[float]]:
    """Return sqrt(1 - alpha) / sqrt(alpha) and sqrt(alpha) before every step and after the last."""
    table = sampler.scheduler._table  # type: ignore[attr-defined]
    alphas = [float(c.sqrt_alpha) for c in table] + [float(table[-1].sqrt_alpha_prev)]
    betas = [float(c.sqrt_beta) for c in table] + [float(table[-1].direction)]
    return [beta / alpha for alpha, beta in zip(alphas, betas, strict=True)], alphas


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_step_sizes_are_how_far_a_prediction_moves_the_final_latents(
    tiny_sd: Callable[..., Any], prediction_type: str
) -> None:
    pipe = tiny_sd(prediction_type=prediction_type).to(torch.float64)
    sampler = Sampler(pipe, SamplingConfig(steps=STEPS))
    generator = torch.Generator().manual_seed(0)
    predictions = torch.randn(STEPS, 1, 4, 4, 4, generator=generator, dtype=torch.float64)

    def final(predictions: Tensor) -> Tensor:
        latents = torch.zeros_like(predictions[0])
        for i in range(STEPS):
            latents, _ = sampler.scheduler.step(latents, predictions[i], i, (), None)
        return latents

    for i, size in enumerate(sampler.step_sizes):
        moved = predictions.clone()
        moved[i] += 1
        difference = final(moved) - final(predictions)
        torch.testing.assert_close(difference, torch.full_like(difference, size), rtol=1e-9, atol=1e-9)
    if prediction_type == "epsilon":
        sigmas, scales = sigmas_and_scales(sampler)
        expected = [scales[-1] * (after - before) for before, after in pairwise(sigmas)]
        assert sampler.step_sizes == pytest.approx(expected, rel=1e-5)


def test_step_sizes_of_a_multistep_scheduler(tiny_sd: Callable[..., Any]) -> None:
    sampler = Sampler(tiny_sd(), SamplingConfig(steps=4))
    one = sampler.step_sizes
    two = step_sizes(TwoStep(sampler.scheduler))  # type: ignore[arg-type]
    assert two == pytest.approx(
        [one[0] - 0.5 * one[1], *(1.5 * one[i] - 0.5 * one[i + 1] for i in (1, 2)), 1.5 * one[3]]
    )


def chain(sampler: Sampler, noise: Noise) -> tuple[list[Tensor], list[Tensor]]:
    """Return the latents before every step and the final ones, and the predictions, without a graph."""
    conditioning, latents = sampler.conditioning(PROMPTS), [noise.initial]
    predictions = []
    with torch.no_grad():
        for i, t in enumerate(sampler.scheduler.timesteps):
            predictions.append(sampler.family.predict(latents[-1], t, conditioning))
            latents.append(sampler.scheduler.step(latents[-1], predictions[-1], i, (), None)[0])
    return latents, predictions


@pytest.mark.parametrize("strategy", ["sparse", "bridge"])
@pytest.mark.parametrize("step", range(4))
def test_sparse_and_bridge_are_flowbps_own_sums(tiny_sd: Callable[..., Any], strategy: str, step: int) -> None:
    """FlowBP adds up cached and recomputed velocities, the latter with a rescaled gradient, over the sigmas."""
    pipe, parameters = tuned(tiny_sd)
    config = BackpropConfig.model_validate({"strategy": strategy, "k": 3})
    sampler = Sampler(pipe, SamplingConfig(steps=STEPS, guidance_scale=2.0), config)
    sigmas, scales = sigmas_and_scales(sampler)
    noise = sampler.noise(PROMPTS, seed=3, step=step)
    latents, predictions = chain(sampler, noise)
    truncation = draw_truncation(config, sampler.step_sizes, seed=3, step=step)
    kept = truncation.kept
    conditioning, timesteps = sampler.conditioning(PROMPTS), sampler.scheduler.timesteps
    lengths = [abs(after - before) for before, after in pairwise(sigmas)]
    rescale = sum(lengths) / sum(lengths[i] for i in kept)
    joint = next((i for i, (_, scale) in truncation.factors.items() if scale), 0)
    assert (joint > 0) == (strategy == "bridge")

    def summed(start: Tensor, first: int, last: int, connected: Tensor | None) -> Tensor:
        total = start
        for i in range(first, last):
            velocity = predictions[i]
            if i in kept:
                seen = latents[i] if connected is None or i != joint else connected
                velocity = sampler.family.predict(seen, timesteps[i], conditioning)
                velocity = rescale * velocity + (1 - rescale) * velocity.detach()
            total = total + (sigmas[i + 1] - sigmas[i]) * velocity
        return total

    middle = summed(latents[0] / scales[0], 0, joint, None)
    seen = scales[joint] * middle
    final = summed(middle, joint, STEPS, 0.1 * seen + 0.9 * seen.detach())
    torch.testing.assert_close(scales[-1] * final.detach(), latents[-1], rtol=0, atol=1e-5)
    (scales[-1] * final).backward(ascent_of(final))
    expected = taken(parameters)
    out = sampler.sample(PROMPTS, noise)
    sampler.backward(out, ascent_of(out.latents))
    # diffusers' tables are float32, so the sum over sigmas equals the chain to that precision.
    torch.testing.assert_close(taken(parameters), expected, rtol=1e-3, atol=1e-5 * float(expected.norm()))


def test_leap_is_leapaligns_two_leaps(tiny_sd: Callable[..., Any]) -> None:
    """Two leaps with one velocity each, connected with a discounted gradient, the value that of the chain."""
    pipe, parameters = tuned(tiny_sd)
    config = BackpropConfig(strategy="leap", input_scale=0.3, leap_tolerance=0.02)
    sampler = Sampler(pipe, SamplingConfig(steps=STEPS, guidance_scale=2.0), config)
    sigmas, scales = sigmas_and_scales(sampler)
    conditioning, timesteps = sampler.conditioning(PROMPTS), sampler.scheduler.timesteps
    for step in range(4):
        noise = sampler.noise(PROMPTS, seed=5, step=step)
        latents, _ = chain(sampler, noise)
        k, j = draw_truncation(config, sampler.step_sizes, seed=5, step=step).kept
        first = sampler.family.predict(latents[k], timesteps[k], conditioning)
        leapt = latents[k] / scales[k] + (sigmas[j] - sigmas[k]) * first
        middle = leapt + (latents[j] / scales[j] - leapt).detach()
        seen = scales[j] * middle
        second = sampler.family.predict(0.3 * seen + 0.7 * seen.detach(), timesteps[j], conditioning)
        end = middle + (sigmas[-1] - sigmas[j]) * second
        final = scales[-1] * (end + (latents[-1] / scales[-1] - end).detach())
        final.backward(ascent_of(final))
        expected = taken(parameters)

        out = sampler.sample(PROMPTS, noise)
        torch.testing.assert_close(out.latents.detach(), latents[-1], rtol=0, atol=1e-10)
        missed = [
            (scales[i] * reached.detach() - latents[i]).abs().flatten(1).mean(1).clamp(min=0.02)
            for i, reached in ((j, leapt), (-1, end))
        ]
        torch.testing.assert_close(out.sample_weights, 1 / (missed[0] + missed[1]), rtol=1e-4, atol=0)
        sampler.backward(out, ascent_of(out.latents))
        torch.testing.assert_close(taken(parameters), expected, rtol=1e-3, atol=1e-5 * float(expected.norm()))


# -- what the gradient is, and is not, defined for --------------------------------------------------------------------


def sample(tiny_sd: Callable[..., Any], **backprop: Any) -> tuple[Sampler, Any, list[torch.nn.Parameter]]:
    pipe, parameters = tuned(tiny_sd)
    sampler = Sampler(pipe, SamplingConfig(steps=3), BackpropConfig(strategy="full", **backprop))
    return sampler, sampler.sample(PROMPTS, sampler.noise(PROMPTS)), parameters


@pytest.mark.parametrize("recomputes", [True, False])
def test_a_second_backward_pass_needs_retain_graph_and_gives_the_same(
    tiny_sd: Callable[..., Any], recomputes: bool
) -> None:
    _, out, parameters = sample(tiny_sd, checkpoint_steps=recomputes)
    loss = (out.latents * ascent_of(out.latents)).sum()
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, parameters)


def test_adapters_changed_before_the_backward_pass_are_an_error(tiny_sd: Callable[..., Any]) -> None:
    sampler, out, parameters = sample(tiny_sd)
    with torch.no_grad():
        parameters[1].add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sampler.backward(out, ascent_of(out.latents))


def test_second_derivatives_are_an_error(tiny_sd: Callable[..., Any]) -> None:
    _, out, parameters = sample(tiny_sd)
    (gradient,) = torch.autograd.grad(out.latents.square().sum(), parameters[1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_gradient_at_the_noise_is_refused(tiny_sd: Callable[..., Any]) -> None:
    pipe, _ = tuned(tiny_sd)
    sampler = Sampler(pipe, SamplingConfig(steps=2))
    noise = sampler.noise(PROMPTS)
    with pytest.raises(RunError, match=r"noise.*detach"):
        sampler.sample(PROMPTS, Noise(noise.initial.requires_grad_()))


@pytest.mark.parametrize("recomputes", [True, False])
def test_a_sample_without_the_adapter_has_no_gradient(tiny_sd: Callable[..., Any], recomputes: bool) -> None:
    pipe, _ = tuned(tiny_sd)
    backprop = BackpropConfig(strategy="full", checkpoint_steps=recomputes)
    sampler = Sampler(pipe, SamplingConfig(steps=2), backprop)
    with sampler.without_lora():
        out = sampler.sample(PROMPTS, sampler.noise(PROMPTS))
    with pytest.raises(RunError, match=r"adapter was off.*without_lora"):
        sampler.backward(out, ascent_of(out.latents))


@pytest.mark.parametrize("strategy", ["full", "last_k"])
def test_without_stored_graphs_sampling_keeps_no_activations(tiny_sd: Callable[..., Any], strategy: str) -> None:
    """All that lives from sampling to the backward pass is the recorded latents: it does not grow with the network."""
    pipe, parameters = tuned(tiny_sd)
    backprop = BackpropConfig(strategy=strategy, checkpoint_steps=True)  # type: ignore[arg-type]
    sampler = Sampler(pipe, SamplingConfig(steps=4), backprop)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    noise = sampler.noise(PROMPTS)
    sampler.sample(PROMPTS, noise)  # measures a single call
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = sampler.sample(PROMPTS, noise)
    weights = sum(
        weight.numel() for tensors in sampler.engine.calls.weights_of(pipe.unet).values() for weight in tensors
    )
    assert sum(saved) <= 3 * sum(p.numel() for p in parameters) + weights
    assert out.latents.requires_grad


def test_checkpointed_blocks_store_a_fraction_of_a_step(tiny_sd: Callable[..., Any]) -> None:
    pipe, _ = tuned(tiny_sd)
    sampler = Sampler(pipe, SamplingConfig(steps=2, width=64, height=64))
    latents, prompts = sampler.noise(PROMPTS).initial, sampler.conditioning(PROMPTS)

    def stored() -> int:
        return graph_bytes(lambda: sampler.family.predict(latents, torch.tensor(1), prompts), [pipe.unet])

    whole = stored()
    sampler.family.checkpoint_denoiser(True)
    assert stored() < whole / 3


def test_a_decoder_whose_layers_run_again_stores_a_fraction(tiny_sd: Callable[..., Any]) -> None:
    pipe = tiny_sd()
    sampler = Sampler(pipe, SamplingConfig(steps=2))
    latents = torch.randn(2, *sampler.latent_shape, requires_grad=True)

    def stored(recomputes: bool) -> int:
        return graph_bytes(lambda: sampler.engine.decoder.pixels(latents, recomputes), [pipe.vae])

    assert stored(True) < 0.5 * stored(False)
