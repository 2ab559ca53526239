"""Effective weights: W + scale * B A added up once a batch, instead of two thin products in every layer at every step.

The same function and the same gradient (dA and dB follow from the gradient at the sum), with one product a layer in
place of three. Exact up to rounding in full precision only: in bfloat16 the sum would lose most of a small change.
Pays where thin products cost as much as they do on CPUs, and where one sum serves many denoising steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn

from alignprop_core._forwards import recomputes


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
        if isinstance(layer, Linear) and _plain(layer)
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


def _plain(layer: Any) -> bool:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return (
        type(layer.base_layer) is nn.Linear
        and not layer.disable_adapters
        and not layer.merged
        and not any(layer.use_dora.get(name, False) for name in names)
        and all(isinstance(layer.lora_dropout[name], nn.Identity) for name in names)
        and all(layer.lora_B[name].bias is None for name in names)
    )
