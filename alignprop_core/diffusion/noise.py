"""The noise of a batch, a function of (seed, step, global sample index) alone.

A sample's noise does not depend on the batch, chunk or process it is computed in, so a run is reproduced exactly
when it is resumed, or repeated with other chunk sizes or another number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


@dataclass(frozen=True)
class Noise:
    """The noise of a batch of B samples and T denoising steps.

    Attributes:
        initial: (B, C, h, w), standard normal.
        seed: the seed it was drawn from.
        step: the training step it was drawn for.
        steps: (T, B, C, h, w) for schedulers that add noise (eta > 0, euler_a, lcm), else None.
        lv: (n, B, C, h, w) for DRaFT-LV, else None.
        indices: the global sample indices it was drawn for; empty for 0 to B - 1.
    """

    initial: Tensor
    seed: int = 0
    step: int = 0
    steps: Tensor | None = None
    lv: Tensor | None = None
    indices: Sequence[int] = ()

    def to(self, device: torch.device, dtype: torch.dtype) -> Noise:
        """Return the noise on a device, without waiting for it."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            # A GPU reads page-locked memory by itself; otherwise the host waits until it has been read.
            locked = tensor.device.type == "cpu" and device.type == "cuda"
            return (tensor.to(dtype).pin_memory() if locked else tensor).to(device, dtype, non_blocking=locked)

        initial = moved(self.initial)
        assert initial is not None
        return replace(self, initial=initial, steps=moved(self.steps), lv=moved(self.lv))

    def __getitem__(self, index: slice) -> Noise:
        """Return the noise of a part of the batch."""
        return replace(
            self,
            initial=self.initial[index],
            steps=None if self.steps is None else self.steps[:, index],
            lv=None if self.lv is None else self.lv[:, index],
            indices=self.indices[index],
        )


def seeded(seed: int, *key: int | str) -> torch.Generator:
    """Return a CPU generator whose state depends on the seed and the key alone.

    The key is hashed, so that neighboring steps or samples have unrelated streams.
    """
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def pipeline_noise(
    shape: tuple[int, ...],
    generator: torch.Generator,
    *,
    scheduler_steps: int = 0,
    lv_samples: int = 0,
    device: torch.device,
    dtype: torch.dtype,
) -> Noise:
    """Draw the noise of a batch as diffusers' pipelines draw it, from one generator for the whole batch.

    Args:
        shape: (B, C, h, w), of all latents.
        generator: the generator; its initial seed is the noise's seed.
        scheduler_steps: T if the scheduler adds noise at every step, else 0.
        lv_samples: number of DRaFT-LV samples of each final latent.
        device: where the noise goes.
        dtype: dtype of the result.
    """

    def draw(count: int) -> Tensor:
        return torch.stack([randn_tensor(shape, generator=generator, device=device, dtype=dtype) for _ in range(count)])

    return Noise(
        # In the pipeline's order: the initial latents first, then one draw for each step.
        initial=draw(1)[0],
        seed=generator.initial_seed(),
        steps=draw(scheduler_steps) if scheduler_steps else None,
        lv=draw(lv_samples) if lv_samples else None,
    )
