"""Networks in half precision: adapters in the network's dtype, and gradients that float16 can represent.

The adapters' parameters stay in float32, which is all that the optimizer, checkpoints and files see. The layers compute
with copies of them in the network's dtype, made once per batch, with alpha and strength folded into B.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn

from alignprop_core.diffusion.cpu import Forwards, Weights, is_plain

_ALIGNMENT = 8
"""Numbers of half precision that GPUs load at once: matrix products are slow if a side is not a multiple of it."""

_LARGEST = 2**-2
"""Largest element of a scaled gradient: far from float16's largest number, 65,504, and from its smallest, 6e-8."""


def low_rank_weights(network: nn.Module) -> dict[nn.Module, tuple[Tensor, ...]]:
    """Return A (rank, in) and scale * B (out, rank) of the network's adapted linear layers, in the adapters' dtype.

    The adapters of a layer are joined along the rank, and zeros that change nothing added up to a multiple of
    `_ALIGNMENT`; B is 0 where an adapter is off, so shapes depend on the attached adapters alone. The tensors have a
    graph to the parameters if gradients are on. Layers with more than plain LoRA (dropout, DoRA, convolutions) have
    none; peft computes them in the adapters' dtype.
    """
    found: dict[nn.Module, tuple[Tensor, ...]] = {}
    for layer in network.modules():
        if isinstance(layer, Linear) and is_plain(layer):
            pairs = [_scaled_pair(layer, name) for name in layer.lora_A]
            a, b = (torch.cat(parts, dim) for dim, parts in enumerate(zip(*pairs, strict=True)))
            missing = -len(a) % _ALIGNMENT
            found[layer] = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
    return found


def _scaled_pair(layer: Linear, name: str) -> tuple[Tensor, Tensor]:
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    if name in layer.active_adapters:
        return a, layer.scaling[name] * b
    return a.detach(), torch.zeros_like(b, requires_grad=False)


def low_rank_forwards(network: Any, weights: Weights | None = None) -> Forwards:
    """Return forwards of the adapted layers that compute x W + x A B in the network's dtype.

    Args:
        network: the network.
        weights: its low-rank weights, in any dtype; computed if None.
    """
    weights = low_rank_weights(network) if weights is None else weights
    return {
        layer: partial(_low_rank, layer=layer, a=a.to(network.dtype), b=b.to(network.dtype))
        for layer, (a, b) in weights.items()
    }


def _low_rank(x: Tensor, *_args: Any, layer: Any, a: Tensor, b: Tensor, **_kwargs: Any) -> Tensor:
    rows = x.flatten(0, -2)
    # The product adds to the layer's output in place: two passes over it less than a sum of two.
    out: Tensor = layer.base_layer(rows).addmm_(F.linear(rows, a), b.t())
    return out.view(*x.shape[:-1], -1)


def scaled(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return a gradient whose largest element is 1/4, and the factor, (), that undoes it; no sync with the host."""
    factor = gradient.abs().amax() / _LARGEST
    factor = torch.where(factor > 0, factor, 1.0)
    return gradient / factor, factor


def with_scaled_gradient(call: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Return call(inputs), whose backward pass goes through the call with a scaled gradient and undoes the scale."""
    factors: list[Tensor] = []

    def scale(gradient: Tensor) -> Tensor:
        gradient, factor = scaled(gradient)
        factors.append(factor)
        return gradient

    inner = inputs.view_as(inputs)  # hooks on `inputs` itself would stay there
    outputs = call(inner)
    if inner.requires_grad:
        outputs.register_hook(scale)  # type: ignore[no-untyped-call]
        inner.register_hook(lambda gradient: gradient * factors.pop())  # type: ignore[no-untyped-call]
    return outputs
