"""Cheaper forwards on a CPU: summed LoRA weights and fused upsampling change cost, never values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from alignprop_core.config.model import BackpropConfig, SamplingConfig
from alignprop_core.diffusion.cpu import doubling_forwards, effective_weights, replaced
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.lora import adapters as lora

PROMPTS = ["a fox", "three owls"]


def tuned(tiny_sd: Callable[..., Any], **options: Any) -> tuple[Any, list[nn.Parameter]]:
    """Return a float64 pipeline with an adapter whose B is not zero."""
    pipe = tiny_sd().to(torch.float64)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    parameters = lora.attach(pipe.unet, rank=2, alpha=3.0, dtype=torch.float64, **options)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters[1::2]:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=g, dtype=parameter.dtype))
    return pipe, parameters


def gradient(sampler: Sampler, parameters: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """Images, and the adapters' gradient of a function in which every pixel counts differently."""
    out = sampler.sample(PROMPTS, sampler.noise(PROMPTS, seed=1, step=0))
    latents = out.latents.detach().requires_grad_()
    images = sampler.decode(latents)
    weights = torch.linspace(-1, 1, images.numel(), dtype=images.dtype).view_as(images).cos()
    (grad,) = torch.autograd.grad((weights * images + 0.3 * images**2).sum(), latents)
    sampler.backward(out, grad)
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return images.detach(), flat


@pytest.mark.parametrize(
    "backprop",
    [
        {"strategy": "full"},
        {"strategy": "last_k", "k": 2, "checkpoint_steps": True},
        {"strategy": "last_k", "lv_samples": 2},
        {"strategy": "drtune", "k": 2},
        {"strategy": "full", "checkpoint_decoder": True},
        {"strategy": "last_k", "k": 2, "checkpoint_steps": True, "checkpoint_blocks": True},
        {"strategy": "last_k", "k": 2, "checkpoint_steps": False, "checkpoint_blocks": True},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_images_and_gradients_equal_those_of_the_original_forwards(
    tiny_sd: Callable[..., Any], backprop: dict[str, Any]
) -> None:
    pipe, parameters = tuned(tiny_sd, use_rslora=True)
    sampler = Sampler(pipe, SamplingConfig(steps=4, guidance_scale=3.0), BackpropConfig.model_validate(backprop))
    assert effective_weights(pipe.unet)
    assert doubling_forwards(pipe.unet)
    images, found = gradient(sampler, parameters)
    sampler.engine.calls.forwards_of = lambda network, weights=None: {}
    own_images, own = gradient(sampler, parameters)
    torch.testing.assert_close(images, own_images, atol=1e-12, rtol=0)
    torch.testing.assert_close(found, own, atol=1e-10 * float(own.abs().max()), rtol=1e-8)
    assert own.abs().max() > 0


def test_frozen_adapters_and_strengths_are_in_the_sum(tiny_sd: Callable[..., Any], tmp_path: Any) -> None:
    source, _ = tuned(tiny_sd, seed=3)
    lora.save(source.unet, tmp_path / "frozen", name="frozen")
    pipe, parameters = tuned(tiny_sd)
    lora.attach_frozen(pipe, tmp_path / "frozen", 0.6, dtype=torch.float64)
    lora.set_strength(pipe.unet, 0.4)
    sampler = Sampler(pipe, SamplingConfig(steps=2, guidance_scale=3.0), BackpropConfig(strategy="full"))
    images, found = gradient(sampler, parameters)
    sampler.engine.calls.forwards_of = lambda network, weights=None: {}
    own_images, own = gradient(sampler, parameters)
    torch.testing.assert_close(images, own_images, atol=1e-12, rtol=0)
    torch.testing.assert_close(found, own, atol=1e-10 * float(own.abs().max()), rtol=1e-8)


def test_every_batch_uses_the_current_adapters(tiny_sd: Callable[..., Any]) -> None:
    pipe, parameters = tuned(tiny_sd)
    sampler = Sampler(pipe, SamplingConfig(steps=2), BackpropConfig(strategy="full"))
    noise = sampler.noise(["fox"], seed=0, step=0)
    with torch.no_grad():
        before = sampler.sample(["fox"], noise).latents
        parameters[1].add_(0.3)
        changed = sampler.sample(["fox"], noise).latents
        with lora.disabled(pipe.unet):
            base = sampler.sample(["fox"], noise).latents
    assert (before - changed).abs().max() > 1e-6
    assert (before - base).abs().max() > 1e-6
    plain = tiny_sd().to(torch.float64)
    with torch.no_grad():
        untouched = Sampler(plain, SamplingConfig(steps=2)).sample(["fox"], noise).latents
    torch.testing.assert_close(base, untouched, atol=1e-12, rtol=0)


def test_layers_with_more_than_plain_lora_are_not_replaced(tiny_sd: Callable[..., Any]) -> None:
    from peft import LoraConfig

    for options in ({"lora_dropout": 0.3}, {"use_dora": True}, {"lora_bias": True}):
        unet = tiny_sd().unet
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_out.0"], **options))
        assert effective_weights(unet) == {}


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 1), (1, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_fused_upsampling_equals_upsampling_then_convolution(size: tuple[int, int], bias: bool) -> None:
    layer = Upsample2D(6, use_conv=True, out_channels=5, bias=bias).double().requires_grad_(False)
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    forwards = doubling_forwards(layer)
    assert set(forwards) == {layer}
    weights = torch.randn(2, 5, 2 * size[0], 2 * size[1], dtype=torch.float64)
    own = layer(x)
    (own_gradient,) = torch.autograd.grad((own * weights).sum(), x)
    with replaced(forwards):
        fused = layer(x)
        odd = layer(x, output_size=(2 * size[0] + 1, 2 * size[1]))
    (gradient_,) = torch.autograd.grad((fused * weights).sum(), x)
    torch.testing.assert_close(fused, own)
    torch.testing.assert_close(gradient_, own_gradient)
    torch.testing.assert_close(odd, layer(x, output_size=(2 * size[0] + 1, 2 * size[1])))
    assert "forward" not in layer.__dict__


def test_a_changed_convolution_gets_a_new_kernel() -> None:
    layer = Upsample2D(2, use_conv=True).requires_grad_(False)
    x = torch.randn(1, 2, 3, 3)
    with replaced(doubling_forwards(layer)):
        layer(x)
    with torch.no_grad():
        layer.conv.weight.mul_(2)
    with replaced(doubling_forwards(layer)):
        torch.testing.assert_close(layer(x), type(layer).forward(layer, x))


def test_trainable_convolutions_and_other_upsampling_are_not_replaced() -> None:
    assert doubling_forwards(Upsample2D(2, use_conv=True)) == {}
    assert doubling_forwards(Upsample2D(2, use_conv=False)) == {}
    assert doubling_forwards(Upsample2D(2, use_conv_transpose=True).requires_grad_(False)) == {}


def test_forwards_are_restored_after_an_error() -> None:
    layer = nn.Linear(2, 2)

    def broken(_: Tensor) -> Tensor:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), replaced({layer: broken}):
        layer(torch.ones(2))
    assert layer(torch.ones(2)).shape == (2,)
