"""Cheaper forwards of the networks' layers on a CPU: the same function and the same gradient, with fewer products.

Effective weights: W + scale * B A is added up once per batch, instead of two thin products in every layer at every
step. dA and dB follow from the gradient at the sum. Exact up to rounding in full precision only: in bfloat16 the sum
would lose most of a small change. It pays where thin products cost as much as they do on CPUs, and where one sum serves
many denoising steps.

Doubling and convolving in one: nearest-neighbour upsampling repeats each pixel 2x2 times, so the 3x3 convolution after
it multiplies the same value by several weights. Adding those weights up first gives one transposed convolution (kernel
4, stride 2, padding 1): 4 products per output pixel and channel pair instead of 9, the same function, edges included,
up to rounding. These are the widest layers of a decoder: at Stable Diffusion's sizes over a quarter of its work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from peft.tuners.lora import Linear
from torch import Tensor, nn

Forwards = Mapping[nn.Module, Callable[..., Tensor]]
"""Module -> the function that replaces its `forward`."""

_kernels: WeakKeyDictionary[nn.Conv2d, tuple[int, Tensor]] = WeakKeyDictionary()


@contextmanager
def replaced(forwards: Forwards) -> Iterator[None]:
    """Let each module compute with its stand-in inside the block."""
    before: dict[Any, Any] = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


def recomputes(network: nn.Module) -> bool:
    """Whether a network checkpoints parts of itself: it would run them again in the backward pass, outside any
    `replaced` block, and find another graph there."""
    return any(getattr(module, "gradient_checkpointing", False) for module in network.modules())


def effective_forwards(network: nn.Module) -> dict[nn.Module, Callable[..., Tensor]]:
    """Forwards with effective weights for the network's adapted linear layers; the sums keep their graph to A and B.

    Layers that hold more than plain LoRA (dropout, DoRA, merged or switched-off adapters, convolutions) are left to
    peft, and so is a network that recomputes parts of itself.
    """
    if recomputes(network):
        return {}
    return {
        layer: partial(_linear, weight=_effective(layer), bias=layer.base_layer.bias)
        for layer in network.modules()
        if isinstance(layer, Linear) and _plain_lora(layer)
    }


def _linear(x: Tensor, *_args: Any, weight: Tensor, bias: Tensor | None, **_kwargs: Any) -> Tensor:
    return F.linear(x, weight, bias)


def _effective(layer: Any) -> Tensor:
    weight: Tensor = layer.base_layer.weight
    for name in layer.active_adapters:
        if name in layer.lora_A:
            change = layer.lora_B[name].weight @ layer.lora_A[name].weight
            weight = weight + (layer.scaling[name] * change).to(weight.dtype)
    return weight


def _plain_lora(layer: Any) -> bool:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return (
        type(layer.base_layer) is nn.Linear
        and not layer.disable_adapters
        and not layer.merged
        and not any(layer.use_dora.get(name, False) for name in names)
        and all(isinstance(layer.lora_dropout[name], nn.Identity) for name in names)
        and all(layer.lora_B[name].bias is None for name in names)
    )


def doubling_forwards(network: nn.Module) -> dict[nn.Module, Callable[..., Tensor]]:
    """Forwards for the network's upsampling layers that double and convolve in one.

    Layers of another kind (adapted or trained convolutions, other kernels, upsampling without one) keep their own.
    """
    if recomputes(network):
        return {}
    return {
        layer: partial(_double, layer=layer, kernel=_kernel(layer.conv), bias=layer.conv.bias)
        for layer in network.modules()
        if isinstance(layer, Upsample2D) and _plain_upsampling(layer)
    }


def _double(
    x: Tensor, output_size: Any = None, *_args: Any, layer: Any, kernel: Tensor, bias: Tensor | None, **_kwargs: Any
) -> Tensor:
    if output_size is not None and tuple(output_size) != (2 * x.shape[-2], 2 * x.shape[-1]):
        own: Tensor = type(layer).forward(layer, x, output_size)
        return own
    return F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)


def _kernel(conv: nn.Conv2d) -> Tensor:
    """(in, out, 4, 4): the 3x3 kernel convolved with a 2x2 block of ones, in the transposed convolution's order."""
    version = conv.weight._version
    if conv not in _kernels or _kernels[conv][0] != version:
        out, inside = conv.weight.shape[:2]
        with torch.no_grad():
            flat = conv.weight.detach().reshape(out * inside, 1, 3, 3)
            wide = F.conv2d(flat, flat.new_ones(1, 1, 2, 2), padding=1).view(out, inside, 4, 4)
            kernel = wide.transpose(0, 1).flip(2, 3).contiguous(memory_format=torch.channels_last)
        _kernels[conv] = (version, kernel)
    return _kernels[conv][1]


def _plain_upsampling(layer: Any) -> bool:
    conv = getattr(layer, "conv", None)
    return (
        type(conv) is nn.Conv2d
        and not conv.weight.requires_grad
        and layer.use_conv
        and layer.interpolate
        and layer.norm is None
        and (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )
