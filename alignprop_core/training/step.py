"""One step's gradient: sample, decode, score, backpropagate into the adapters, add up over processes, clip.

prompts -> sampler.noise -> sampler.sample -> sampler.decode -> mix.gradient -> sampler.backward -> .grad
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial, reduce
from operator import add

import torch
from accelerate import PartialState
from torch import Tensor, nn

from alignprop_core.config.sections import RunConfig, TrainingConfig
from alignprop_core.diffusion.noise import seeded
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.diffusion.truncation import Truncation
from alignprop_core.mix.mix import Mix
from alignprop_core.mix.stats import StepStats
from alignprop_core.prompts import PromptSet
from alignprop_core.reward import ImageBatch
from alignprop_core.training.optimizer import Optimizer


class StepGradient:
    """Computes the gradient of one optimizer step into the adapters' `.grad`.

    The gradient is that of minus the mean over the step's samples of (the mix's total - the regularization).

    Args:
        config: the run config.
        sampler: the sampler, with a trainable adapter.
        mix: the rewards.
        prompts: the training prompts.
        optimizer: knows the loss scale, and clips.
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
        self._samples = samples_of(processes.process_index, processes.num_processes, config.training)

    def calibrate(self, step: int) -> int:
        """Show the mix one step's statistics before its first step; returns the number of images scored."""
        stats = self._stats_of(step, backward=False)
        if self.processes.num_processes > 1:
            torch.distributed.all_reduce(stats.sums)
        stats = stats.to_host()
        self.mix.update(stats)
        return stats.images

    def compute(self, step: int) -> StepStats:
        """Compute the clipped gradient of the step that follows `step` done ones; statistics are on the host."""
        stats = self._stats_of(step)
        if self.processes.num_processes > 1:
            sum_over_processes(self.optimizer.parameters, stats.sums)
        stats.scalar("grad_norm").copy_(self.optimizer.clip())
        return stats.to_host()

    def _stats_of(self, step: int, *, backward: bool = True) -> StepStats:
        """Run all batches of this process and return the sum of their statistics."""
        seed = self.config.training.seed
        truncation = self.sampler.truncation(seed=seed, step=step)
        stats = StepStats.zeros(self.mix.labels, self.sampler.device)
        stats.kept_steps = len(truncation.kept)
        scale = self.optimizer.scale if backward else 1.0
        for indices in self._samples:
            for part in chunks(indices, self.config.backprop.sample_batch_size):
                stats += self._batch(part, step, truncation, scale if backward else None)
        return stats

    def _batch(self, indices: Sequence[int], step: int, truncation: Truncation, scale: float | None) -> StepStats:
        """Sample, score and backpropagate the samples with these global indices; no backward pass if scale is None.

        Decoder and rewards run chunk by chunk with the gradient computed at the final latents; then one backward pass
        runs through the denoising steps.
        """
        training = self.config.training
        chosen = choose_prompts(len(self.prompts), seed=training.seed, step=step, indices=indices)
        prompts = [self.prompts.prompts[i] for i in chosen]
        metadata = [self.prompts.metadata[i] for i in chosen]
        share = 1.0 / (training.batch_size * training.gradient_accumulation_steps)  # of each sample in the step's mean
        noise = self.sampler.noise(prompts, seed=training.seed, step=step, indices=indices)
        out = self.sampler.sample(prompts, noise, truncation)
        gradients: list[Tensor] = []
        parts: list[StepStats] = []
        for rows in chunks(range(len(out.sample_index)), self.config.backprop.decode_batch_size):
            chunk = slice(rows[0], rows[-1] + 1)
            latents = out.latents[chunk].detach().requires_grad_()
            images = self.sampler.decode(latents)
            owners = out.sample_index[chunk]
            batch = ImageBatch(
                images=images, prompts=[prompts[i] for i in owners], metadata=[metadata[i] for i in owners]
            )
            weights = out.sample_weights[chunk] * share
            pullback = partial(_pull_back, images, latents, scale or 1.0)
            gradient, stats = self.mix.gradient(batch, weights, step=step, pullback=pullback)
            parts.append(stats)
            if scale is None:
                continue
            # Gradient ascent on the objective is descent on the loss, hence the sign.
            ascent = -scale * gradient.to(images)
            gradients += [ascent] if self.mix.at_latent else torch.autograd.grad(images, latents, grad_outputs=ascent)
        stats = reduce(add, parts)
        stats.scalar("samples").fill_(len(prompts))
        if scale is not None:
            self.sampler.backward(out, torch.cat(gradients), aux_scale=share * scale)
            for loss in out.aux.values():
                stats.scalar("regularization").add_(loss.detach())
        return stats


def _pull_back(images: Tensor, latents: Tensor, scale: float, gradient: Tensor) -> Tensor:
    """Return the gradient at the latents of a gradient at the images decoded from them; the graph is kept."""
    # Under a loss scale the decoder computes in half precision, where gradients of very different norms do not fit.
    norm = gradient.norm().clamp(min=torch.finfo(gradient.dtype).tiny) if scale != 1 else gradient.new_ones(())
    (pulled,) = torch.autograd.grad(images, latents, grad_outputs=gradient / norm * scale, retain_graph=True)
    return pulled * norm / scale


def chunks(items: Sequence[int], size: int | None) -> Iterator[Sequence[int]]:
    """Cut a sequence into parts of at most `size` items; None is one part."""
    size = size or max(len(items), 1)
    return (items[start : start + size] for start in range(0, len(items), size))


def choose_prompts(count: int, *, seed: int, step: int, indices: Sequence[int]) -> list[int]:
    """Return which of `count` prompts each global sample index gets at this step.

    Each step shuffles all prompts anew, so a step repeats a prompt only after it has used all of them; the choice
    depends on (seed, step, index) alone.
    """
    order = torch.randperm(count, generator=seeded(seed, "prompts", step)).tolist()
    return [order[index % count] for index in indices]


def samples_of(process: int, processes: int, training: TrainingConfig) -> list[list[int]]:
    """Return a process's sample indices, one list for each accumulated batch; a batch without any is left out.

    Indices are global: a step covers 0 .. batch_size * gradient_accumulation_steps - 1 over all processes, so the run
    does not depend on their number.
    """
    parts = []
    for batch in range(training.gradient_accumulation_steps):
        whole = range(batch * training.batch_size, (batch + 1) * training.batch_size)
        parts.append(list(whole[process::processes]))
    return [part for part in parts if part]


def sum_over_processes(parameters: Sequence[nn.Parameter], sums: Tensor) -> None:
    """Add up gradients and statistics of all processes in place; each sample's share is of the whole step."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    torch.distributed.all_reduce(flat)
    torch.distributed.all_reduce(sums)
    sizes = [p.numel() for p in parameters]
    for parameter, part in zip(parameters, torch.split(flat, sizes), strict=True):
        parameter.grad = part.view_as(parameter)
