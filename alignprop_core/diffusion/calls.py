"""Calls of a family's networks: dtypes, and the forwards of adapted layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from alignprop_core.diffusion.cpu import Forwards, Weights, cheaper_forwards, effective_weights, replaced
from alignprop_core.diffusion.families.base import Family
from alignprop_core.diffusion.half import low_rank_forwards, low_rank_weights


class NetworkCalls:
    """Calls the networks of a family for the sampler; latents come in and go out in `dtype`.

    Args:
        family: the family; its networks are not changed.

    Attributes:
        device: the denoiser's device.
        dtype: of latents, predictions and images: float64 with a float64 denoiser, else float32. Rounding them to half
            precision at every step would add up over the chain.
        scales_gradients: whether gradients are scaled on their way through a network: in float16.
        weights_of: network -> the tensors that its adapted layers use for one batch, with their graph to the adapters:
            effective weights in full precision on a CPU (`diffusion.cpu`), A and B in half precision and on CUDA
            (`diffusion.half`); elsewhere the layers use the adapters themselves.
        forwards_of: (network, these tensors) -> the layers' forwards.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        network: Any = family.denoiser
        self.device: torch.device = network.device
        self.network_dtype: torch.dtype = network.dtype
        self.dtype = torch.float64 if network.dtype == torch.float64 else torch.float32
        self.scales_gradients = network.dtype == torch.float16
        self.weights_of: Callable[[nn.Module], Weights] = lambda _: {}
        self.forwards_of: Callable[..., Forwards] = lambda *_: {}
        if network.dtype in (torch.float16, torch.bfloat16) or self.device.type == "cuda":
            self.weights_of, self.forwards_of = low_rank_weights, low_rank_forwards
        elif self.device.type == "cpu":
            # Sums of weights are exact in full precision only, and faster only on CPUs.
            self.weights_of, self.forwards_of = effective_weights, cheaper_forwards

    def run(self, call: Callable[..., Tensor], *inputs: Tensor, forwards: Forwards, **named: Any) -> Tensor:
        """Call the family's `predict` or `decode`, with these layer forwards; the output is in `dtype`."""
        with replaced(forwards):
            return call(*inputs, **named).to(self.dtype)
