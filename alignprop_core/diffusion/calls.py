"""Calls of a family's networks: dtypes, the forwards of adapted layers, and what is recomputed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alignprop_core.config.model import BackpropConfig
from alignprop_core.diffusion.cpu import Forwards, Weights, cheaper_forwards, effective_weights, replaced
from alignprop_core.diffusion.families.base import Family
from alignprop_core.diffusion.half import low_rank_forwards, low_rank_weights
from alignprop_core.diffusion.memory import available_bytes, graph_bytes

_MEMORY_SHARE = 0.6
"""Share of the available memory that stored graphs may take; the rest is for their backward pass."""


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


class Checkpointing:
    """Decides what is stored for the backward pass, and what is recomputed in it.

    With "auto", graphs are stored if they fit into the memory that was available when the first was needed.

    Args:
        calls: the networks.
        backprop: the `backprop` section of the run config.
    """

    def __init__(self, calls: NetworkCalls, backprop: BackpropConfig) -> None:
        self._calls = calls
        self._settings = {
            "steps": backprop.checkpoint_steps,
            "blocks": backprop.checkpoint_blocks,
            "decoder": backprop.checkpoint_decoder,
        }
        self._fitting: dict[str, float] = {}
        self._enabled: dict[str, bool] = {}

    def recomputes(self, part: Literal["steps", "blocks", "decoder"], copies: int, one: Callable[[], Tensor]) -> bool:
        """Return whether a part is recomputed; the network of blocks or decoder is also made to do so.

        Args:
            part: the kept steps, the blocks of the denoiser inside one of them, or the decoder.
            copies: how many graphs of a single sample would be stored at the same time.
            one: runs the network for a single sample, to measure its graph.
        """
        setting, network = self._settings[part], "decoder" if part == "decoder" else "denoiser"
        if setting == "auto" and part == "steps" and self._calls.device.type == "cuda":
            # A GPU repeats a network call in less time than its memory is worth: K graphs or one.
            setting = True
        if setting == "auto":
            if network not in self._fitting:
                self._calls.family.checkpoint(network, False)
                self._enabled[network] = False
                stored = graph_bytes(one, [getattr(self._calls.family, network)])
                self._fitting[network] = _MEMORY_SHARE * available_bytes(self._calls.device) / max(stored, 1)
            setting = copies > self._fitting[network]
        if part != "steps" and self._enabled.get(network) != setting:
            self._calls.family.checkpoint(network, setting)
            self._enabled[network] = setting
        return setting
