"""Half precision: networks run in their own dtype, adapters stay in float32, gradients stay inside float16's range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alignprop_core.config.model import BackpropConfig, SamplingConfig
from alignprop_core.diffusion.half import low_rank_forwards, low_rank_weights, scaled, with_scaled_gradient
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.diffusion.truncation import draw_truncation
from alignprop_core.lora import adapters as lora
from tests.support.plain_autograd import plain_autograd

PROMPTS = ["a fox", "two owls"]
HALVES = [torch.bfloat16, torch.float16]


def tuned(pipe: Any, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """Attach an adapter whose B is not zero."""
    parameters = lora.attach(pipe.unet, rank=2, alpha=3.0, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters[1::2]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return parameters


def taken(parameters: list[torch.nn.Parameter]) -> Tensor:
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return flat


def weighted(images: Tensor) -> Tensor:
    """Return a function in which every pixel counts differently."""
    weights = torch.linspace(-1, 1, images.numel(), dtype=images.dtype).view_as(images).cos()
    return (weights * images + 0.3 * images**2).sum()


def gradient(sampler: Sampler, parameters: list[torch.nn.Parameter], size: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return images, and the gradient of `size` times a function in which every pixel counts differently."""
    out = sampler.sample(PROMPTS, sampler.noise(PROMPTS, seed=1))
    latents = out.latents.detach().requires_grad_()
    images = sampler.decode(latents)
    (at_latents,) = torch.autograd.grad(size * weighted(images), latents)
    sampler.backward(out, at_latents)
    return images.detach(), taken(parameters)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_images_are_near_those_of_full_precision_and_of_diffusers(
    tiny_sd: Callable[..., Any], dtype: torch.dtype
) -> None:
    sampling = SamplingConfig(steps=4, guidance_scale=3.0)
    with torch.no_grad():
        exact = Sampler(tiny_sd(), sampling)(PROMPTS, generator=torch.Generator().manual_seed(3))
        pipe = tiny_sd().to(dtype)
        ours = Sampler(pipe, sampling)(PROMPTS, generator=torch.Generator().manual_seed(3))
    theirs = pipe(
        PROMPTS, num_inference_steps=4, guidance_scale=3.0, generator=torch.Generator().manual_seed(3), output_type="pt"
    ).images  # fmt: skip
    assert ours.dtype == torch.float32
    # diffusers also rounds the latents at every step, so it is farther from full precision than we are.
    assert (ours - exact).abs().mean() < (theirs.float() - exact).abs().mean()
    assert (ours - theirs).abs().mean() < 0.02


def test_matrix_products_of_adapters_have_sides_that_gpus_multiply_fast(tiny_sd: Callable[..., Any]) -> None:
    pipe = tiny_sd()
    tuned(pipe)  # rank 2
    for layer, (a, b) in low_rank_weights(pipe.unet).items():
        assert a.shape == (8, layer.in_features)
        assert b.shape == (layer.out_features, 8)


@pytest.mark.parametrize("strategy", ["full", "last_k"])
@pytest.mark.parametrize("recomputes", ["steps", "blocks", "nothing"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_gradient_is_near_that_of_full_precision(
    tiny_sd: Callable[..., Any], dtype: torch.dtype, recomputes: str, strategy: str
) -> None:
    sampling = SamplingConfig(steps=4, guidance_scale=3.0)
    backprop = BackpropConfig(
        strategy=strategy,  # type: ignore[arg-type]
        checkpoint_steps=recomputes != "nothing",
        checkpoint_blocks=recomputes == "blocks",
    )
    exact_pipe, pipe = tiny_sd(), tiny_sd().to(dtype)
    _, expected = gradient(Sampler(exact_pipe, sampling, backprop), tuned(exact_pipe))
    parameters = tuned(pipe)
    _, found = gradient(Sampler(pipe, sampling, backprop), parameters)
    assert all(p.dtype == torch.float32 for p in parameters)
    assert found.dtype == torch.float32
    assert cosine(found, expected) > (0.995 if dtype == torch.bfloat16 else 0.9999)
    assert float(found.norm() / expected.norm()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("recomputes", ["steps", "blocks", "nothing"])
def test_single_precision_is_as_exact_and_bfloat16_as_near_as_plain_autograd(
    tiny_sd: Callable[..., Any], recomputes: str
) -> None:
    """Against plain autograd in float64, plain autograd in the same precision is the measure."""
    sampling = SamplingConfig(steps=4, guidance_scale=3.0)
    backprop = BackpropConfig(
        strategy="full",
        checkpoint_steps=recomputes != "nothing",
        checkpoint_blocks=recomputes == "blocks",
        checkpoint_decoder=recomputes == "blocks",
    )
    found: dict[tuple[str, torch.dtype], Tensor] = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        pipe = tiny_sd().to(dtype)
        parameters = tuned(pipe, torch.float64 if dtype == torch.float64 else torch.float32)
        sampler = Sampler(pipe, sampling, backprop)
        noise = sampler.noise(PROMPTS, seed=1)
        truncation = draw_truncation(backprop, sampler.step_sizes, seed=0, step=0)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            images = plain_autograd(pipe, PROMPTS, sampling, noise, truncation).to(noise.initial)
        (weighted(images)).backward()  # type: ignore[no-untyped-call]
        found["plain", dtype] = taken(parameters).double()
        found["ours", dtype] = gradient(sampler, parameters)[1].double()
    exact = found["plain", torch.float64]

    def distance(side: str, dtype: torch.dtype) -> float:
        return float((found[side, dtype] - exact).norm() / exact.norm())

    assert distance("ours", torch.float64) < 1e-9
    assert distance("ours", torch.float32) < 2 * distance("plain", torch.float32)
    near = [cosine(found[side, torch.bfloat16], exact) for side in ("ours", "plain")]
    assert near[0] > near[1] - 0.001


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_the_size_of_the_objective_does_not_matter_in_float16(tiny_sd: Callable[..., Any], size: float) -> None:
    """A reward's gradient at a pixel is often below float16's smallest number, a sum over pixels above its largest."""
    pipe = tiny_sd().to(torch.float16)
    parameters = tuned(pipe)
    sampler = Sampler(pipe, SamplingConfig(steps=3, guidance_scale=3.0), BackpropConfig(strategy="full"))
    _, one = gradient(sampler, parameters)
    _, other = gradient(sampler, parameters, size)
    assert torch.isfinite(other).all()
    assert cosine(one, other) > 0.9999
    assert float(other.norm() / one.norm()) == pytest.approx(size, rel=0.02)


def test_regularization_in_float16(tiny_sd: Callable[..., Any]) -> None:
    found = []
    for dtype in (torch.float32, torch.float16):
        pipe = tiny_sd().to(dtype)
        parameters = tuned(pipe)
        sampler = Sampler(
            pipe, SamplingConfig(steps=3, guidance_scale=3.0), BackpropConfig(strategy="full"), regularization=1e-6
        )
        out = sampler.sample(PROMPTS, sampler.noise(PROMPTS, seed=1))
        sampler.backward(out, torch.zeros_like(out.latents))
        found.append((float(out.aux["regularization"].detach()), taken(parameters)))
    (value, exact), (half_value, half) = found
    assert half_value == pytest.approx(value, rel=0.02)
    assert cosine(exact, half) > 0.999
    assert float(half.norm() / exact.norm()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_adapted_layers_compute_what_peft_computes(
    tiny_sd: Callable[..., Any], dtype: torch.dtype, tmp_path: Any
) -> None:
    """A frozen adapter, strengths and a scale that is not 1 are in the copies."""
    source = tiny_sd()
    tuned(source)
    lora.save(source.unet, tmp_path, name="other")
    pipe = tiny_sd().to(dtype)
    lora.attach_frozen(pipe, tmp_path / "other.safetensors", 0.6)
    tuned(pipe)
    lora.set_strength(pipe.unet, 0.4)
    weights = low_rank_weights(pipe.unet)
    forwards = low_rank_forwards(pipe.unet, weights)
    assert len(forwards) == len(lora.parameters(pipe.unet)) // 2
    for layer, forward in forwards.items():
        x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
        torch.testing.assert_close(forward(x), layer(x), rtol=0.02, atol=0.02)
    with lora.disabled(pipe.unet):
        for layer, forward in low_rank_forwards(pipe.unet).items():
            x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
            torch.testing.assert_close(forward(x), layer(x), rtol=0.02, atol=0.02)  # the frozen adapter stays on


def test_a_scaled_gradient_has_one_size_and_is_undone() -> None:
    for size in (1e-30, 1.0, 1e30):
        gradient = size * torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
        small, factor = scaled(gradient)
        assert float(small.abs().max()) == pytest.approx(0.25)
        torch.testing.assert_close(small * factor, gradient)
    zero, factor = scaled(torch.zeros(2))
    assert float(factor) == 1.0
    assert not zero.any()
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (at_x,) = torch.autograd.grad(with_scaled_gradient(torch.square, x).sum() * 1e-20, x)
    torch.testing.assert_close(at_x, torch.tensor([2e-20, 4e-20]))
