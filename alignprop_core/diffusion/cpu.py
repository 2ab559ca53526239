"""Cheaper forwards of the networks' layers on a CPU: the same function and the same gradient, with fewer products.

Effective weights: W + scale * B A is computed once per batch, instead of two thin matrix products in every layer at
every step. Autograd derives dA and dB from the gradient of the sum. It is exact up to rounding in full precision only:
in bfloat16 the sum would lose most of a small change. It is faster on CPUs, where thin products are slow, because one
sum is used at many denoising steps.

Fused upsampling: nearest-neighbor upsampling repeats each pixel 2x2 times, so the 3x3 convolution after it multiplies
the same value by several weights. Summing those weights first gives one transposed convolution (kernel 4, stride 2,
padding 1): 4 products per output pixel and channel pair instead of 9, the same function up to rounding, edges included.
These are the widest layers of a decoder: over a quarter of its work at Stable Diffusion's sizes.
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
from torch.nn.attention import SDPBackend, sdpa_kernel

ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Kernels of attention that the networks may use, in forward and backward passes: not cuDNN's, whose backward pass
corrupts memory at FLUX.1's size (torch 2.11, H200)."""

Forwards = Mapping[nn.Module, Callable[..., Tensor]]
"""Module -> the function that replaces its `forward`."""

Weights = Mapping[nn.Module, tuple[Tensor, ...]]
"""Adapted layer -> the tensors that its forward uses instead of the adapters' parameters."""

# Fused kernels with the version of the weights they were computed from; an entry lives as long as its convolution.
_kernels: WeakKeyDictionary[nn.Conv2d, tuple[int, Tensor]] = WeakKeyDictionary()


@contextmanager
def replaced(forwards: Forwards) -> Iterator[None]:
    """Replace the modules' `forward` in the block, and choose kernels of attention; nests, undone after an error."""
    before: dict[Any, Any] = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        with sdpa_kernel(ATTENTION):
            yield
    finally:
        for module, own in before.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


def cheaper_forwards(network: nn.Module, weights: Weights | None = None) -> Forwards:
    """Return the cheaper forwards of a network's layers.

    If the network uses gradient checkpointing inside, its backward pass must be in the same `replaced` block: it runs
    parts of itself again there.

    Args:
        network: the network.
        weights: its effective weights; computed if None.
    """
    weights = effective_weights(network) if weights is None else weights
    linear = {layer: partial(_linear, weight=weight, layer=layer) for layer, (weight,) in weights.items()}
    return linear | doubling_forwards(network)


def effective_weights(network: nn.Module) -> dict[nn.Module, tuple[Tensor, ...]]:
    """Return the effective weights of the network's adapted linear layers, with their graph if gradients are on.

    Layers with more than plain LoRA (dropout, DoRA, merged or disabled adapters, convolutions) have none.
    """
    return {layer: (_effective(layer),) for layer in network.modules() if isinstance(layer, Linear) and is_plain(layer)}


def _linear(x: Tensor, *_args: Any, weight: Tensor, layer: Any, **_kwargs: Any) -> Tensor:
    return F.linear(x, weight, layer.base_layer.bias)


def _effective(layer: Any) -> Tensor:
    weight: Tensor = layer.base_layer.weight  # (out, in)
    for name in layer.active_adapters:
        if name in layer.lora_A:
            # (out, rank) @ (rank, in), in the adapter's dtype.
            change = layer.lora_B[name].weight @ layer.lora_A[name].weight
            weight = weight + (layer.scaling[name] * change).to(weight.dtype)
    return weight


def is_plain(layer: Any) -> bool:
    """Whether a linear layer computes x W + scale * x A B and nothing else: no dropout, DoRA, merging or bias."""
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
    """Return forwards for the network's upsampling layers that upsample and convolve in one operation.

    Layers of other kinds (adapted or trained convolutions, other kernels, no convolution) are not replaced.
    """
    return {
        layer: partial(_double, layer=layer, kernel=_kernel(layer.conv), bias=layer.conv.bias)
        for layer in network.modules()
        if isinstance(layer, Upsample2D) and _plain_upsampling(layer)
    }


def _double(
    x: Tensor, output_size: Any = None, *_args: Any, layer: Any, kernel: Tensor, bias: Tensor | None, **_kwargs: Any
) -> Tensor:
    if output_size is not None and tuple(output_size) != (2 * x.shape[-2], 2 * x.shape[-1]):
        # Odd sizes, as UNets ask for them when the input is not a multiple of their factor: not a plain doubling.
        own: Tensor = type(layer).forward(layer, x, output_size)
        return own
    return F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)


def _kernel(conv: nn.Conv2d) -> Tensor:
    """Return the fused kernel, (in, out, 4, 4): the 3x3 kernel convolved with a 2x2 block of ones."""
    # torch counts in-place changes of a tensor: weights that were loaded or trained meanwhile are summed again.
    version = conv.weight._version
    if conv not in _kernels or _kernels[conv][0] != version:
        out, inside = conv.weight.shape[:2]
        # Not an inference tensor: it is kept for later calls, which may need a gradient.
        with torch.inference_mode(False), torch.no_grad():
            # Every (out, in) pair is a one-channel image, and 2x2 ones with padding 1 add up the weights that meet one
            # input pixel. A transposed convolution applies its kernel flipped, with the channels swapped.
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
