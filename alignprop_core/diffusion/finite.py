"""Values that are not finite: in which network, denoising step and sample they first appear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignprop_core.diffusion.noise import Noise
from alignprop_core.errors import RunError

if TYPE_CHECKING:
    from alignprop_core.diffusion.sampler import Sampler


ADVICE = (
    "Float16 overflows in some models: use mixed precision bf16 or no, or a VAE made for float16. In other precisions "
    "the cause is damaged weights, or a LoRA of a training that diverged."
)
"""What to do if a model's images are not finite."""


@dataclass(frozen=True)
class NotFinite:
    """The first value of a batch that is not finite.

    Attributes:
        place: the part that it comes from, such as "the prediction of the unet in denoising step 2 of 12".
        prompt: the sample's prompt.
        sample: the sample's number: in the batch, or in the training step.
        seed: the seed of its noise.
        by_model: whether the model's images have it, before any score or gradient.
        image: (3, H, W), the finite image whose score or gradient is not finite; None if there is none.
        saved: where the image was saved.
    """

    place: str
    prompt: str
    sample: int
    seed: int
    by_model: bool = False
    image: Tensor | None = None
    saved: str = ""

    def __str__(self) -> str:
        """Return place, prompt, sample and seed in words."""
        saved = f"; the image is saved as {self.saved}" if self.saved else ""
        return f'{self.place}, for the prompt "{self.prompt}" (sample {self.sample}, seed {self.seed}{saved})'


def first_bad(values: Tensor) -> int | None:
    """Return the first row of values, (B, ...), that is not finite; None if all are."""
    finite = values.reshape(len(values), -1).isfinite().all(1).tolist()
    return None if all(finite) else finite.index(False)


def at_row(place: str, row: int, prompts: Sequence[str], noise: Noise, **more: Any) -> NotFinite:
    """Return that a row of a batch is not finite at a place."""
    return NotFinite(place, prompts[row], noise.indices[row] if noise.indices else row, noise.seed, **more)


def find_in_images(sampler: Sampler, prompts: Sequence[str], noise: Noise) -> tuple[NotFinite | None, Tensor]:
    """Generate a batch once more and return the first part that is not finite, and the final latents, (B, C, h, w).

    Args:
        sampler: the sampler.
        prompts: B prompts.
        noise: the batch's randomness.
    """
    steps, noise = sampler.scheduler.steps, noise.to(sampler.device, sampler.dtype)
    latents, state = sampler.scheduler.initial_scale * noise.initial, sampler.scheduler.initial_state
    network = sampler.family.denoiser_name

    def at(place: str, row: int) -> tuple[NotFinite, Tensor]:
        return at_row(place, row, prompts, noise, by_model=True), latents

    with torch.no_grad():
        for i in range(steps):
            prediction = sampler.predict(latents, i, prompts)
            if (row := first_bad(prediction)) is not None:
                return at(f"the prediction of the {network} in denoising step {i + 1} of {steps}", row)
            fresh = None if noise.steps is None else noise.steps[i]
            latents, state = sampler.scheduler.step(latents, prediction, i, state, fresh)
            if (row := first_bad(latents)) is not None:
                return at(f"the scheduler's latents after denoising step {i + 1} of {steps}", row)
        for row in range(len(latents)):
            if first_bad(sampler.decode(latents[row : row + 1])) is not None:
                return at("the image decoded by the vae from finite latents", row)
    return None, latents


def require_finite(sampler: Sampler, images: Tensor, prompts: Sequence[str], noise: Noise) -> None:
    """Raise `RunError` unless all images of a batch are finite, naming network, denoising step, prompt and seed.

    Args:
        sampler: the sampler that generated them.
        images: (B, 3, H, W).
        prompts: B prompts.
        noise: the noise they were generated from.
    """
    if (row := first_bad(images)) is not None:
        # Nothing is found where a second time all is finite, such as on a faulty device.
        found = find_in_images(sampler, prompts, noise)[0] or at_row("a decoded image", row, prompts, noise)
        raise RunError(f"The model's images are not finite: the first value that is not is {found}. {ADVICE}")
