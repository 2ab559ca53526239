"""One batch of the objective: sample, score, and send the mix's direction back into the adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from alignprop_core.diffusion.noise import Noise
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.mix.figures import Figures
from alignprop_core.mix.mix import Direction, Mix
from alignprop_core.reward import ImageBatch


@dataclass(frozen=True)
class Outcome:
    """What a batch gave; tensors are detached and still on their device.

    Attributes:
        raw: label -> (R,) raw scores of all R images (B, or more with LV samples).
        weighted: label -> (R,) contributions to the total.
        total: (R,) the objective of each image.
        figures: sums for the step's log and the mix's running figures.
        aux: scalar losses beside the rewards (regularization), each summed over samples.
    """

    raw: Mapping[str, Tensor]
    weighted: Mapping[str, Tensor]
    total: Tensor
    figures: Figures
    aux: tuple[Tensor, ...] = ()

    @staticmethod
    def join(directions: Sequence[Direction]) -> Outcome:
        """Join what a batch's chunks gave."""
        parts = [direction.scores for direction in directions]
        labels = list(parts[0].raw)
        return Outcome(
            raw={label: torch.cat([part.raw[label] for part in parts]) for label in labels},
            weighted={label: torch.cat([part.weighted[label] for part in parts]) for label in labels},
            total=torch.cat([part.total for part in parts]),
            figures=reduce(add, [direction.figures for direction in directions]),
        )


def chunks(total: int, size: int | None) -> Iterator[slice]:
    """Cut range(total) into slices of at most `size`; None is one slice."""
    size = size or max(total, 1)
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def backpropagate(
    sampler: Sampler,
    mix: Mix,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    noise: Noise,
    *,
    share: float,
    scale: float = 1.0,
    step: int = 0,
    send: bool = True,
) -> Outcome:
    """Add the gradient of -share * sum over samples of (the mix's total - aux losses) to the adapters' `.grad`.

    Decoder and rewards run chunk by chunk with the gradient taken at the final latents; then one backward pass runs
    through the denoising steps. An LV sample counts as its part of the sample it came from.

    Args:
        sampler: the sampler, adapters attached.
        mix: the rewards.
        prompts: B prompts.
        metadata: B mappings.
        noise: the batch's randomness.
        share: each sample's share of the objective, such as 1 / (batch size of the whole step).
        scale: loss scale (float16 only); multiplies the gradient.
        step: optimizer steps done, for the mix's schedules.
        send: False only takes the figures of just these images; nothing is sent back.
    """
    directions: list[Direction] = []
    losses: list[Tensor] = []
    for part in chunks(len(prompts), sampler.backprop.sample_batch_size):
        out = sampler.sample(prompts[part], noise[part])
        rows = out.latents.shape[0]
        copies = rows // len(prompts[part])
        gradients: list[Tensor] = []
        for chunk in chunks(rows, sampler.backprop.decode_batch_size):
            latents = out.latents[chunk].detach().requires_grad_()
            images = sampler.decode(latents)
            owners = [part.start + i for i in out.sample_index[chunk]]
            batch = ImageBatch(
                images=images, prompts=[prompts[i] for i in owners], metadata=[metadata[i] for i in owners]
            )
            weights = images.new_full((len(owners),), share / copies)
            pull = partial(_at_latents, images, latents, scale)
            direction = mix.direction(batch, weights, step=step, pull=pull)
            directions.append(direction)
            if not send:
                continue
            # Ascent of the reward is descent of the loss, hence the sign.
            ascent = -scale * direction.gradient.to(images)
            if mix.at_latent:
                gradients.append(ascent)
            else:
                gradients += torch.autograd.grad(images, latents, grad_outputs=ascent)
        if not send:
            continue
        sampler.backward(out, torch.cat(gradients), aux_scale=share * scale)
        losses += [loss.detach() for loss in out.aux.values()]
    return replace(Outcome.join(directions), aux=tuple(losses))


def _at_latents(images: Tensor, latents: Tensor, scale: float, gradient: Tensor) -> Tensor:
    """Send one term's gradient at the images on to the latents they were decoded from; the graph stays for the next."""
    # Under a loss scale the decoder computes in half precision, where gradients of very different sizes would not fit.
    size = gradient.norm().clamp(min=torch.finfo(gradient.dtype).tiny) if scale != 1 else gradient.new_ones(())
    (pulled,) = torch.autograd.grad(images, latents, grad_outputs=gradient / size * scale, retain_graph=True)
    return pulled * size / scale
