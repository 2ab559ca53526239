"""What sampling returns, and the clip of decoded pixels that keeps their gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleOutput:
    """What sampling returns.

    Attributes:
        latents: (R, C, h, w), the end of the denoising graph. R is B, or B * (1 + n) with n LV samples: first the B
            samples, then n further sets of B.
        sample_index: R integers: which of the B prompts a row belongs to.
        sample_weights: (R,), the weight of a row within its sample; they add up to 1 for each of the B prompts.
        aux: scalar losses that arise while sampling, summed over the B samples; `Sampler.backward` adds their gradient.
    """

    latents: Tensor
    sample_index: tuple[int, ...]
    sample_weights: Tensor
    aux: Mapping[str, Tensor] = field(default_factory=dict)


class StraightThroughClip(torch.autograd.Function):
    """Clip to [0, 1] in the forward pass; the backward pass is the identity, so saturated pixels can still learn.

    Straight-through estimator (Bengio et al. 2013, https://arxiv.org/abs/1308.3432).
    """

    @staticmethod
    def forward(ctx: Any, pixels: Tensor) -> Tensor:
        """Return the clipped pixels."""
        return pixels.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return the gradient unchanged."""
        return gradient
