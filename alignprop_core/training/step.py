"""One step's gradient: sample, decode, score, backpropagate into the adapters, add up over processes, clip.

prompts -> sampler.noise -> sampler.sample -> sampler.decode -> mix.gradient -> sampler.backward -> .grad
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from operator import add
from statistics import mean
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from alignprop_core.config.sections import RunConfig
from alignprop_core.diffusion.costs import Costs, seconds_of
from alignprop_core.diffusion.finite import NotFinite
from alignprop_core.diffusion.noise import Noise, seeded
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.diffusion.truncation import Truncation, draw_truncation
from alignprop_core.mix.mix import Mix
from alignprop_core.mix.stats import StepStats
from alignprop_core.prompts import PromptSet
from alignprop_core.reward import ImageBatch
from alignprop_core.training.diagnosis import first_not_finite
from alignprop_core.training.optimizer import Optimizer


class StepGradient:
    """Computes the gradient of one optimizer step into the adapters' `.grad`.

    The gradient is that of minus the mean over the step's samples of (the mix's total - the regularization).

    Args:
        config: the run config.
        sampler: the sampler, with a trainable adapter.
        mix: the rewards.
        prompts: the training prompts.
        optimizer: clips the gradient.
        processes: this process among the others.
    """

    def __init__(
        self,
        config: RunConfig,
        sampler: Sampler,
        mix: Mix,
        prompts: PromptSet,
        optimizer: Optimizer,
        processes: PartialState,
    ) -> None:
        self.config, self.sampler, self.mix, self.prompts = config, sampler, mix, prompts
        self.optimizer, self.processes = optimizer, processes
        self._chunks: list[range] = []
        self._next: tuple[tuple[Sequence[int], int], tuple[Any, ...]] | None = None  # (indices, step), inputs
        self._own_batch = -(-config.training.batch_size // processes.num_processes)
        # (step) -> the steps of its batches that keep their gradient
        self._draw = partial(draw_truncation, config.backprop, sampler.step_sizes, seed=config.training.seed)

    def calibrate(self, step: int) -> int:
        """Show the mix one step's statistics before its first step; returns the number of images scored."""
        stats = self.compute(step, backward=False)
        self.mix.update(stats)
        return stats.images

    def kept_steps(self, step: int) -> int:
        """Return how many denoising steps keep their gradient in a step."""
        return len(self._draw(step=step).kept)

    def costs(self, step: int) -> Costs:
        """Predict what the step after `step` done ones will need, on a GPU; for the mean of a hundred truncations."""
        sampler, config = self.sampler, self.config
        kept = mean(self.kept_steps(other) for other in range(100))
        regularized = bool(sampler.regularization)
        costs = sampler.engine.costs(self._own_batch, kept, steps=sampler.scheduler.steps, regularization=regularized)
        # Decoder and rewards, on images of this step's prompts.
        samples = sampler.memory.level(self._own_batch).samples
        latents = torch.zeros((samples, *sampler.latent_shape), device=sampler.device, dtype=sampler.dtype)
        rows = sampler.engine.decoded_at_once(latents)
        prompts, metadata, _ = self._inputs(range(len(rows)), step)
        chunk = partial(self._ascent, rows, prompts, metadata, torch.ones_like(rows[:, 0, 0, 0]), step)
        torch.cuda.reset_peak_memory_stats(sampler.device)
        images = self._own_batch * (1 + config.backprop.lv_samples)
        seconds = costs.seconds + -(-images // len(rows)) * seconds_of(chunk, sampler.device)
        return replace(
            costs,
            seconds=seconds * config.training.gradient_accumulation_steps,
            peak_memory=max(costs.peak_memory, torch.cuda.max_memory_reserved(sampler.device)),
        )

    def compute(self, step: int, *, backward: bool = True) -> StepStats:
        """Compute the clipped gradient of the step that follows `step` done ones; statistics are on the host.

        Args:
            step: optimizer steps done.
            backward: False computes the statistics alone.
        """
        truncation = self._draw(step=step)
        stats = StepStats.zeros(self.mix.labels, self.sampler.device)
        if not self._chunks:
            chunk = self.sampler.memory.level(self._own_batch).samples
            self._chunks = chunks_of(self.processes.process_index, self.processes.num_processes, self.config, chunk)
        for indices in self._chunks:
            stats += self._batch(indices, step, truncation, backward)
        if self.processes.num_processes > 1:
            torch.distributed.all_reduce(stats.sums)
            if backward:
                sum_over_processes(self.optimizer.parameters)
        if backward:
            stats["grad_norm"] = self.optimizer.clip()
        # While a GPU still works: drawing noise takes the CPU a while.
        self._next = (self._chunks[0], step + 1), self._inputs(self._chunks[0], step + 1)
        # The step's only transfer from the device.
        return replace(stats, sums=stats.sums.cpu(), kept_steps=len(truncation.kept))

    def first_not_finite(self, step: int) -> NotFinite | None:
        """Return the first value of a step that has failed that is not finite; None if all are."""
        for indices in self._chunks:
            prompts, metadata, noise = self._inputs(indices, step)
            found = first_not_finite(self.sampler, self.mix, prompts, metadata, noise, self._draw(step=step))
            if found is not None:
                return found
        return None

    def _inputs(self, indices: Sequence[int], step: int) -> tuple[list[str], list[Mapping[str, Any]], Noise]:
        """Return prompts, metadata and noise of the samples with these global indices."""
        if self._next is not None and self._next[0] == (indices, step):
            prompts, metadata, noise = self._next[1]
            return prompts, metadata, noise
        seed = self.config.training.seed
        chosen = choose_prompts(len(self.prompts), seed=seed, step=step, indices=indices)
        prompts = [self.prompts.prompts[i] for i in chosen]
        noise = self.sampler.noise(prompts, seed=seed, step=step, indices=indices)
        return prompts, [self.prompts.metadata[i] for i in chosen], noise

    def _batch(self, indices: Sequence[int], step: int, truncation: Truncation, backward: bool) -> StepStats:
        """Sample, score and, with `backward`, backpropagate the samples with these global indices.

        Decoder and rewards run chunk by chunk with the gradient computed at the final latents; then one backward pass
        runs through the denoising steps.
        """
        training = self.config.training
        prompts, metadata, noise = self._inputs(indices, step)
        share = 1.0 / (training.batch_size * training.gradient_accumulation_steps)  # of each sample in the step's mean
        out = self.sampler.sample(prompts, noise, truncation)
        gradients: list[Tensor] = []
        parts: list[StepStats] = []
        size = self.sampler.memory.level(len(prompts)).images or len(out.latents)
        for start in range(0, len(out.latents), size):
            chunk = slice(start, start + size)
            owners, weights = out.sample_index[chunk], out.sample_weights[chunk] * share
            texts, facts = [prompts[i] for i in owners], [metadata[i] for i in owners]
            gradient, statistics = self._ascent(out.latents[chunk], texts, facts, weights, step, backward=backward)
            gradients.append(gradient)
            parts.append(statistics)
        stats = reduce(add, parts)
        stats["samples"] = len(prompts)
        if backward:
            # Gradient ascent on the objective is descent on the loss, hence the sign.
            self.sampler.backward(out, -torch.cat(gradients), aux_scale=share)
            for loss in out.aux.values():
                stats["regularization"].add_(loss.detach())
        return stats

    def _ascent(
        self,
        latents: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        weights: Tensor,
        step: int,
        *,
        backward: bool = True,
    ) -> tuple[Tensor, StepStats]:
        """Decode and score latents, (b, C, h, w); returns the objective's gradient there and the statistics.

        Without `backward`, the gradient is not taken through the decoder.
        """
        latents = latents.detach().requires_grad_()
        images = self.sampler.decode(latents)
        batch = ImageBatch(images=images, prompts=prompts, metadata=metadata)
        pullback = partial(_pull_back, images, latents)
        gradient, stats = self.mix.gradient(batch, weights, step=step, pullback=pullback)
        if backward and not self.mix.at_latent:
            (gradient,) = torch.autograd.grad(images, latents, grad_outputs=gradient.to(images))
        return gradient, stats


def _pull_back(images: Tensor, latents: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient at the latents of a gradient at the images decoded from them; the graph is kept."""
    (pulled,) = torch.autograd.grad(images, latents, grad_outputs=gradient, retain_graph=True)
    return pulled


def choose_prompts(count: int, *, seed: int, step: int, indices: Sequence[int]) -> list[int]:
    """Return which of `count` prompts each global sample index gets at this step.

    Each step shuffles all prompts anew, so a step repeats a prompt only after it has used all of them; the choice
    depends on (seed, step, index) alone.
    """
    order = torch.randperm(count, generator=seeded(seed, "prompts", step)).tolist()
    return [order[index % count] for index in indices]


def chunks_of(process: int, processes: int, config: RunConfig, chunk: int) -> list[range]:
    """Return a process's sample indices, one range for each accumulated batch, or for each chunk of one.

    Indices are global: a step covers 0 .. batch_size * gradient_accumulation_steps - 1 over all processes, so the run
    does not depend on their number.
    """
    size, found = config.training.batch_size, []
    for batch in range(config.training.gradient_accumulation_steps):
        own = range(batch * size, (batch + 1) * size)[process::processes]
        found += [own[start : start + chunk] for start in range(0, len(own), chunk)]
    return found


def sum_over_processes(parameters: Sequence[nn.Parameter]) -> None:
    """Add up the gradients of all processes in place; each sample's share is of the whole step."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    torch.distributed.all_reduce(flat)
    sizes = [p.numel() for p in parameters]
    for parameter, part in zip(parameters, torch.split(flat, sizes), strict=True):
        parameter.grad = part.view_as(parameter)
