"""Calls of a family's networks: working dtype, autocast, cheaper layer forwards on a CPU, cached prompt encodings."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from alignprop_core.diffusion.cpu import Forwards, doubling_forwards, effective_forwards, replaced
from alignprop_core.diffusion.families.base import Conditioning, Family

_CACHED_PROMPTS = 512


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
        self._half = weights if weights in (torch.float16, torch.bfloat16) else None
        # Sums of weights are exact in full precision only, and faster only on CPUs.
        self.sums_weights = self.device.type == "cpu" and self._half is None
        self._encoded: OrderedDict[tuple[str, str, bool], Conditioning] = OrderedDict()

    def encode(self, prompts: Sequence[str], negative_prompt: str, *, with_lora: bool) -> Conditioning:
        """Encode prompts, each alone and only once, so that a prompt's encoding does not depend on its batch.

        Args:
            prompts: B strings.
            negative_prompt: used with guidance.
            with_lora: whether the text encoders' adapters are on; the two states are cached apart.
        """
        keys = [(prompt, negative_prompt, with_lora) for prompt in prompts]
        for key in keys:
            if key not in self._encoded:
                self._encoded[key] = self.family.encode([key[0]], negative_prompt)
            self._encoded.move_to_end(key)
        batch = Conditioning.cat([self._encoded[key] for key in keys])
        while len(self._encoded) > _CACHED_PROMPTS:
            self._encoded.popitem(last=False)
        return batch

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

    def _autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self._half is None else torch.autocast(self.device.type, dtype=self._half)
