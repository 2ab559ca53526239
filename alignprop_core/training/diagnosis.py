"""Where a step stopped being finite: its parts run once more, each one checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignprop_core.diffusion.finite import NotFinite, at_row, find_in_images, first_bad
from alignprop_core.diffusion.noise import Noise
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.diffusion.truncation import Truncation
from alignprop_core.evaluation.sheet import save_image
from alignprop_core.images import to_pil
from alignprop_core.mix.mix import Mix
from alignprop_core.reward import ImageBatch

if TYPE_CHECKING:
    from alignprop_core.training.trainer import Trainer


def locate_not_finite(trainer: Trainer, step: int) -> NotFinite | None:
    """Return the first value of a step that is not finite; save the image of a score or gradient that is not."""
    found = trainer.gradient.first_not_finite(step)
    if found is None or found.image is None:
        return found
    path = trainer.output / "images" / f"not_finite-{step + 1:06d}.png"
    save_image(to_pil(found.image), path)
    return replace(found, saved=str(path))


def first_not_finite(
    sampler: Sampler,
    mix: Mix,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    noise: Noise,
    truncation: Truncation,
) -> NotFinite | None:
    """Return the first part of a batch's step that is not finite; None if everything is.

    In the order of the step: denoising steps, decoder, scores, the gradients of the scores at the images, and the
    backward passes of decoder and denoiser with the gradient of the pixels' sum.

    Args:
        sampler: the sampler.
        mix: the rewards.
        prompts: B prompts.
        metadata: their metadata.
        noise: the batch's randomness.
        truncation: the steps that keep their gradient.
    """
    found, latents = find_in_images(sampler, prompts, noise)
    if found is not None:
        return found

    def at(row: int, place: str, image: Tensor | None = None) -> NotFinite:
        return at_row(place, row, prompts, noise, image=image)

    for row in range(len(latents)):
        with torch.no_grad():
            image = sampler.decode(latents[row : row + 1])
        for term in mix.terms:
            leaf = image.clone().requires_grad_(term.differentiable)
            score = term.score(ImageBatch(images=leaf, prompts=[prompts[row]], metadata=[metadata[row]]))
            if not score.isfinite().all():
                return at(row, f'the score of "{term.label}"', image[0])
            if term.differentiable:
                with term.placed:
                    (gradient,) = torch.autograd.grad(score.sum(), leaf)
                if not gradient.isfinite().all():
                    return at(row, f'the gradient of "{term.label}" at the image', image[0])
    leaf = latents.detach().requires_grad_()
    gradients = [
        torch.autograd.grad(sampler.decode(leaf[row : row + 1]).sum(), leaf)[0][row : row + 1]
        for row in range(len(leaf))
    ]
    if (bad := first_bad(torch.cat(gradients))) is not None:
        return at(bad, "the backward pass of the decoder")
    steps, noise = sampler.scheduler.steps, noise.to(sampler.device, sampler.dtype)
    for i in reversed(truncation.kept):
        for row in range(len(prompts)):
            # The networks compute every sample by itself, and the other steps only by the scheduler.
            one = Truncation((i,), stop_at=truncation.stop_at)
            out = sampler.sample([prompts[row]], noise[row : row + 1], one)
            loss = (out.latents * gradients[row]).sum()
            grads = torch.autograd.grad(loss, sampler.trainable_parameters(), allow_unused=True)
            if not all(grad is None or grad.isfinite().all() for grad in grads):
                return at(
                    row, f"the backward pass of the {sampler.family.denoiser_name} in denoising step {i + 1} of {steps}"
                )
    return None
