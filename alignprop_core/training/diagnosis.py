"""Where a step stopped being finite: its parts run once more, each one checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignprop_core.diffusion.noise import Noise
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.diffusion.truncation import Truncation
from alignprop_core.mix.mix import Mix
from alignprop_core.reward import ImageBatch


def first_not_finite(
    sampler: Sampler,
    mix: Mix,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    noise: Noise,
    truncation: Truncation,
) -> str:
    """Return in words which part of a batch's step is the first that is not finite, and for which prompt.

    In the order of the step: denoising steps, decoder, scores, and the backward passes of decoder and denoiser with the
    gradient of the pixels' sum. The gradients of rewards are not computed again. Empty if everything is finite.

    Args:
        sampler: the sampler.
        mix: the rewards.
        prompts: B prompts.
        metadata: their metadata.
        noise: the batch's randomness.
        truncation: the steps that keep their gradient.
    """

    def at(values: Tensor, place: str) -> str:
        """Name the place and the first prompt whose values, (B, ...), are not finite; empty if all are."""
        finite = values.flatten(1).isfinite().all(1).tolist() if len(values) else []
        return "" if all(finite) else f'{place}, for the prompt "{prompts[finite.index(False) % len(prompts)]}"'

    steps = sampler.scheduler.steps
    noise = noise.to(sampler.device, sampler.dtype)
    latents, state = noise.initial, sampler.scheduler.initial_state
    with torch.no_grad():
        for i in range(steps):
            prediction = sampler.predict(latents, i, prompts)
            if found := at(prediction, f"the prediction of denoising step {i + 1} of {steps}"):
                return found
            fresh = None if noise.steps is None else noise.steps[i]
            latents, state = sampler.scheduler.step(latents, prediction, i, state, fresh)
        for start in range(len(latents)):
            rows = slice(start, start + 1)
            images = sampler.decode(latents[rows])
            one = ImageBatch(images=images, prompts=prompts[rows], metadata=metadata[rows])
            if not images.isfinite().all():
                return f'the decoded image, for the prompt "{prompts[start]}"'
            for term in mix.terms:
                if not term.score(one).isfinite().all():
                    return f'the score of "{term.label}", for the prompt "{prompts[start]}"'
    leaf = latents.detach().requires_grad_()
    gradients = [
        torch.autograd.grad(sampler.decode(leaf[start : start + 1]).sum(), leaf)[0][start : start + 1]
        for start in range(len(leaf))
    ]
    if found := at(torch.cat(gradients), "the backward pass of the decoder"):
        return found
    for i in reversed(truncation.kept):
        for start, prompt in enumerate(prompts):
            # The networks compute every sample by itself, and the other steps only by the scheduler.
            out = sampler.sample([prompt], noise[start : start + 1], Truncation((i,), stop_at=truncation.stop_at))
            loss = (out.latents * gradients[start]).sum()
            found_here = torch.autograd.grad(loss, sampler.trainable_parameters(), allow_unused=True)
            if not all(grad is None or grad.isfinite().all() for grad in found_here):
                return f'the backward pass of denoising step {i + 1} of {steps}, for the prompt "{prompt}"'
    return ""
