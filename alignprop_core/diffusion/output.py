"""What sampling returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class SampleOutput:
    """What sampling returns.

    Attributes:
        latents: (R, C, h, w), the end of the denoising graph. R is B, or B * (1 + n) with n LV samples: first the B
            samples, then n further sets of B.
        sample_index: R integers: which of the B prompts a row belongs to.
        sample_weights: (R,), the weight of a row; the rows of a prompt add up to 1, or to its weight with `leap`.
        aux: scalar losses that arise while sampling, summed over the B samples; `Sampler.backward` adds their gradient.
    """

    latents: Tensor
    sample_index: tuple[int, ...]
    sample_weights: Tensor
    aux: Mapping[str, Tensor] = field(default_factory=dict)
