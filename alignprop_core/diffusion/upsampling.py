"""Doubling and convolving in one: 4 products an output pixel and channel pair instead of 9.

Nearest-neighbour upsampling repeats each pixel 2x2 times, so the 3x3 convolution after it multiplies the same value
by several weights. Adding those weights up first gives one transposed convolution (kernel 4, stride 2, padding 1):
the same function, edges included, up to rounding. These are the widest layers of a decoder: at Stable Diffusion's
sizes over a quarter of its work.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from alignprop_core._forwards import recomputes

_kernels: WeakKeyDictionary[nn.Conv2d, tuple[int, Tensor]] = WeakKeyDictionary()


def doubling_forwards(network: nn.Module) -> dict[nn.Module, Callable[..., Tensor]]:
    """Forwards for the network's upsampling layers that double and convolve in one.

    Layers of another kind (adapted or trained convolutions, other kernels, upsampling without one) keep their own.
    """
    if recomputes(network):
        return {}
    return {
        layer: partial(_double, layer=layer, kernel=_kernel(layer.conv), bias=layer.conv.bias)
        for layer in network.modules()
        if isinstance(layer, Upsample2D) and _plain(layer)
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


def _plain(layer: Any) -> bool:
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
