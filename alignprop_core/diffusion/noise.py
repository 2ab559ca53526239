"""All randomness of a batch, from (seed, step, global sample index) alone.

So a resumed run is the run, and so is one on another number of processes or with other chunk sizes: a sample's noise
does not depend on which batch, chunk or process it is computed in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignprop_core.diffusion.truncation import Plan


@dataclass(frozen=True)
class Noise:
    """Everything random about one batch of B samples and T steps.

    Attributes:
        initial: (B, C, h, w), standard normal.
        steps: (T, B, C, h, w) for schedulers that add noise (eta > 0), else None.
        lv: (n, B, C, h, w) for DRaFT-LV, else None.
        plan: the batch's cut.
    """

    initial: Tensor
    plan: Plan
    steps: Tensor | None = None
    lv: Tensor | None = None

    def __getitem__(self, index: slice) -> Noise:
        """Return the noise of a part of the batch; the cut stays the batch's."""
        return Noise(
            initial=self.initial[index],
            plan=self.plan,
            steps=None if self.steps is None else self.steps[:, index],
            lv=None if self.lv is None else self.lv[:, index],
        )


def seeded(seed: int, *key: int | str) -> torch.Generator:
    """Return a CPU generator whose state depends on the seed and the key alone.

    The key is hashed, so that neighbouring steps or samples have unrelated streams.
    """
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def sample_noise(
    shape: tuple[int, ...],
    *,
    seed: int,
    step: int,
    indices: Sequence[int],
    plan: Plan,
    scheduler_steps: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Noise:
    """Draw the noise of the samples with these global indices.

    Drawn on the CPU in float32, so every device sees the same numbers.

    Args:
        shape: (C, h, w) of one latent.
        seed: the run's seed.
        step: the training step.
        indices: global sample index of each sample within the step.
        plan: the batch's cut.
        scheduler_steps: T if the scheduler adds noise at every step, else 0.
        dtype: dtype of the result.
    """

    def draw(purpose: str, count: int) -> Tensor:
        rows = [
            torch.randn((count, *shape), generator=seeded(seed, purpose, step, index), dtype=torch.float32)
            for index in indices
        ]
        return torch.stack(rows, dim=1).to(dtype)

    return Noise(
        initial=draw("initial", 1)[0],
        plan=plan,
        steps=draw("steps", scheduler_steps) if scheduler_steps else None,
        lv=draw("lv", plan.lv_samples) if plan.lv_samples else None,
    )
