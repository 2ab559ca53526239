"""Attention: the chosen kernels' gradients are as exact as the plain ones', at the sizes of the families' networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from alignprop_core.diffusion.cpu import ATTENTION
from alignprop_core.diffusion.sampler import Sampler

SHAPES = {  # rows with guidance, heads, tokens, width of a head
    "Stable Diffusion 1.5": (2, 8, 4096, 40),
    "Stable Diffusion XL": (2, 10, 4096, 64),
    "Stable Diffusion 3.5 medium": (2, 24, 4096 + 333, 64),
    "FLUX.1": (1, 24, 4096 + 512, 128),
    "Z-Image": (1, 30, 4096 + 96, 128),
}


def outputs(inputs: list[Tensor], kernels: list[SDPBackend]) -> list[Tensor]:
    """Return attention's output and its gradients at queries, keys and values."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    with sdpa_kernel(kernels):
        found = F.scaled_dot_product_attention(*leaves)
        at_output = torch.linspace(-1, 1, found.numel(), device=found.device).cos().view_as(found).to(found.dtype)
        return [found.detach(), *torch.autograd.grad(found, leaves, at_output)]


@pytest.mark.gpu
@pytest.mark.parametrize("model", SHAPES)
def test_attention_at_true_size_is_as_exact_as_the_plain_kernel(model: str) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [torch.randn(SHAPES[model], device="cuda", generator=generator).bfloat16() for _ in range(3)]
    exact = outputs([value.double() if SHAPES[model][0] == 1 else value.float() for value in inputs], [SDPBackend.MATH])
    plain = outputs(inputs, [SDPBackend.MATH])
    for ours, theirs, true in zip(outputs(inputs, ATTENTION), plain, exact, strict=True):
        error, usual = ((value - true).norm() / true.norm() for value in (ours, theirs))
        assert float(error) <= 1.5 * float(usual)


def test_networks_run_without_cudnn_attention(tiny_model: Path) -> None:
    backprop = {"checkpoint_steps": True, "checkpoint_blocks": True}
    sampler = Sampler.load(tiny_model, rank=2, sampling={"steps": 2}, backprop=backprop, device="cpu")
    allowed: list[bool] = []
    for part in (sampler.family.denoiser, sampler.family.decoder):
        for module in part.modules():
            if type(module).__name__ == "Attention":
                module.register_forward_pre_hook(lambda *_: allowed.append(torch.backends.cuda.cudnn_sdp_enabled()))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    images = sampler(["a fox"])
    forwards = len(allowed)
    images.square().sum().backward()
    assert len(allowed) > forwards > 0  # the backward pass runs blocks again
    assert not any(allowed)
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
