"""Calls of a family's networks: working dtype, autocast, cheaper layer forwards, and what is recomputed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alignprop_core.config.model import BackpropConfig
from alignprop_core.diffusion.cpu import Forwards, cheaper_forwards, effective_weights, replaced
from alignprop_core.diffusion.families.base import Family
from alignprop_core.diffusion.memory import available_bytes, graph_bytes

_MEMORY_SHARE = 0.6
"""Share of the available memory that stored graphs may take; the rest is for their backward pass."""


class NetworkCalls:
    """Calls the networks of a family for the sampler; latents come in and go out in `dtype`.

    Args:
        family: the family; its networks are not changed.

    Attributes:
        device: the denoiser's device.
        dtype: of latents, predictions and images: float64 with a float64 denoiser, else float32.
        effective_weights: network -> the effective weights of its layers for one batch (`diffusion.cpu`): in full
            precision on a CPU; elsewhere there are none.
        forwards_of: (network, effective weights) -> cheaper forwards of its layers, likewise.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        network: Any = family.denoiser
        self.device: torch.device = network.device
        weights: torch.dtype = network.dtype
        # Latents stay in float32 with half-precision networks: rounding them at every step adds up over the chain.
        self.dtype = torch.float64 if weights == torch.float64 else torch.float32
        half = weights in (torch.float16, torch.bfloat16)
        self._autocast: Callable[[], AbstractContextManager[object]] = (
            partial(torch.autocast, self.device.type, dtype=weights) if half else nullcontext
        )
        # Sums of weights are exact in full precision only, and faster only on CPUs.
        cheaper = self.device.type == "cpu" and not half
        self.forwards_of: Callable[..., Forwards] = cheaper_forwards if cheaper else lambda *_: {}
        self.effective_weights: Callable[[nn.Module], Mapping[nn.Module, Tensor]] = (
            effective_weights if cheaper else lambda _: {}
        )

    def run(self, call: Callable[..., Tensor], *inputs: Tensor, forwards: Forwards, **named: Any) -> Tensor:
        """Call the family's `predict` or `decode`, with these layer forwards; the output is in `dtype`."""
        with self._autocast(), replaced(forwards):
            return call(*inputs, **named).to(self.dtype)


class Checkpointing:
    """Decides whether kept steps and decoder are stored for the backward pass, or recomputed in it.

    With "auto" they are stored if the graphs fit into the memory that was available when the first was needed.

    Args:
        calls: the networks.
        backprop: the `backprop` section of the run config.
    """

    def __init__(self, calls: NetworkCalls, backprop: BackpropConfig) -> None:
        self._calls = calls
        self._settings = {"steps": backprop.checkpoint_steps, "decoder": backprop.checkpoint_decoder}
        self._fitting: dict[str, float] = {}
        self._decoder_recomputes: bool | None = None

    def recomputes(self, part: Literal["steps", "decoder"], copies: int, one: Callable[[], Tensor]) -> bool:
        """Return whether a part is recomputed; a decoder is also made to do so.

        Args:
            part: the kept steps or the decoder.
            copies: how many graphs of a single sample would be stored: samples, times kept steps.
            one: runs the part for a single sample, to measure its graph.
        """
        family, setting = self._calls.family, self._settings[part]
        if setting == "auto" and part == "steps" and self._calls.device.type == "cuda":
            # A GPU repeats a network call in less time than its memory is worth: K graphs or one.
            setting = True
        if setting == "auto":
            if part not in self._fitting:
                if part == "decoder":
                    family.checkpoint_decoder(False)
                    self._decoder_recomputes = False
                stored = graph_bytes(one, [family.denoiser if part == "steps" else family.decoder])
                self._fitting[part] = _MEMORY_SHARE * available_bytes(self._calls.device) / max(stored, 1)
            setting = copies > self._fitting[part]
        if part == "decoder" and setting != self._decoder_recomputes:
            family.checkpoint_decoder(setting)
            self._decoder_recomputes = setting
        return setting
