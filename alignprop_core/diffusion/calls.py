"""Calls of a family's networks: working dtype, autocast, cheaper layer forwards on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alignprop_core.diffusion.cpu import Forwards, doubling_forwards, effective_forwards, replaced
from alignprop_core.diffusion.families.base import Conditioning, Family


class NetworkCalls:
    """Calls the networks of a family for the sampler; latents come in and go out in `dtype`.

    Args:
        family: the family; its networks are not changed.

    Attributes:
        device: the denoiser's device.
        dtype: of latents, predictions and images: float64 with a float64 denoiser, else float32.
        sums_weights: whether layers run with summed weights (`diffusion.cpu`): full precision on a CPU.
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
        self.sums_weights = self.device.type == "cpu" and not half

    def denoiser_forwards(self, *, with_graph: bool) -> Forwards:
        """Return cheaper forwards of the denoiser's layers for one batch; the adapters may change before the next."""
        if not self.sums_weights:
            return {}
        with torch.set_grad_enabled(with_graph):
            return effective_forwards(self.family.denoiser) | doubling_forwards(self.family.denoiser)

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, forwards: Forwards) -> Tensor:
        """Return the guided prediction, (B, C, h, w), at a 0-dim timestep, computed with these layer forwards."""
        with self._autocast(), replaced(forwards):
            return self.family.predict(latents, timestep, conditioning).to(self.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels (B, 3, H, W), nominally in [0, 1] but not clipped, of latents (B, C, h, w)."""
        forwards = doubling_forwards(self.family.decoder) if self.sums_weights else {}
        with self._autocast(), replaced(forwards):
            return self.family.decode(latents).to(self.dtype)
