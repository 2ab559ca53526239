"""A step's gradient: its batches sampled and scored, sent back into the adapters, and summed over all processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import PartialState
from torch import Tensor, nn

from alignprop_core.config.sections import RunConfig, TrainingConfig
from alignprop_core.diffusion.noise import seeded
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.mix.figures import Figures, StepFigures
from alignprop_core.mix.mix import Mix
from alignprop_core.prompts import PromptSet
from alignprop_core.training.objective import Outcome, backpropagate
from alignprop_core.training.updates import Updates


@dataclass(frozen=True)
class Taken:
    """What a step's batches gave, over all processes.

    Attributes:
        figures: the mix's figures.
        grad_norm: norm of the adapters' gradient before clipping.
        regularization: mean over the step's samples of the losses beside the rewards.
    """

    figures: StepFigures
    grad_norm: float
    regularization: float


class StepGradient:
    """Takes a step's gradient into the adapters' `.grad`.

    Args:
        config: the run config.
        sampler: the sampler, adapters attached.
        mix: the rewards.
        prompts: to train on.
        updates: what the gradients are for; it knows the loss scale and clips.
        processes: this process among the others.
    """

    def __init__(
        self,
        config: RunConfig,
        sampler: Sampler,
        mix: Mix,
        prompts: PromptSet,
        updates: Updates,
        processes: PartialState,
    ) -> None:
        self.config, self.sampler, self.mix, self.prompts = config, sampler, mix, prompts
        self.updates, self.processes = updates, processes

    def learn_sizes(self, step: int) -> int:
        """Give the mix a whole step's figures before its first step; returns how many images were scored for it."""
        flat = self._sums([self._batch(indices, step, send=False) for indices in self._indices()])
        if self.processes.num_processes > 1:
            torch.distributed.all_reduce(flat)
        figures = StepFigures.read(Figures.from_flat(flat, len(self.mix.terms)), self.mix.labels)
        self.mix.update(figures)
        return figures.images

    def take(self, step: int) -> Taken:
        """Take the clipped gradient of the step after `step` done ones; figures come to the host in one transfer."""
        outcomes = [self._batch(indices, step) for indices in self._indices()]
        flat = self._sums(outcomes)
        if self.processes.num_processes > 1:
            sum_over_processes(self.updates.parameters, flat)
        norm = self.updates.clip()
        *sums, grad_norm = torch.cat([flat, norm.to(flat).view(1)]).tolist()
        figures = StepFigures.read(
            Figures.from_flat(torch.tensor(sums, dtype=torch.float64), len(self.mix.terms)), self.mix.labels
        )
        return Taken(figures, grad_norm, self._regularization(outcomes, figures.images))

    def _indices(self) -> list[list[int]]:
        return samples_of(self.processes.process_index, self.processes.num_processes, self.config.training)

    def _batch(self, indices: Sequence[int], step: int, *, send: bool = True) -> Outcome:
        training = self.config.training
        chosen = choose_prompts(len(self.prompts.prompts), seed=training.seed, step=step, indices=indices)
        noise = self.sampler.noise(seed=training.seed, step=step, indices=indices)
        return backpropagate(
            self.sampler,
            self.mix,
            [self.prompts.prompts[i] for i in chosen],
            [self.prompts.metadata[i] for i in chosen],
            noise,
            share=1.0 / (training.batch_size * training.gradient_accumulation_steps),
            scale=self.updates.scale,
            step=step,
            send=send,
        )

    def _sums(self, outcomes: Sequence[Outcome]) -> Tensor:
        """Return the sums over this process's images, as `Figures.flat` lays them out."""
        zeros = Figures.zeros(len(self.mix.terms), self.updates.device)
        return sum((outcome.figures for outcome in outcomes), start=zeros).flat()

    def _regularization(self, outcomes: Sequence[Outcome], images: int) -> float:
        if not self.config.regularization.weight:
            return 0.0
        whole = torch.zeros((), device=self.updates.device)
        for outcome in outcomes:
            whole += torch.stack(outcome.aux).sum()
        if self.processes.num_processes > 1:
            torch.distributed.all_reduce(whole)
        return float(whole) / images


def choose_prompts(count: int, *, seed: int, step: int, indices: Sequence[int]) -> list[int]:
    """Return which of `count` prompts each global sample index gets at this step.

    Every step shuffles all prompts anew, so a step has no prompt twice before it has all of them once; the choice
    depends on (seed, step, index) alone.
    """
    order = torch.randperm(count, generator=seeded(seed, "prompts", step)).tolist()
    return [order[index % count] for index in indices]


def samples_of(process: int, processes: int, training: TrainingConfig) -> list[list[int]]:
    """Return a process's sample indices, a list for each accumulated batch; one that has none in a batch skips it.

    Indices are global: a step covers 0 .. batch_size * gradient_accumulation_steps - 1 over all processes, so the run
    is the same on any number of them.
    """
    parts = []
    for batch in range(training.gradient_accumulation_steps):
        whole = range(batch * training.batch_size, (batch + 1) * training.batch_size)
        parts.append(list(whole[process::processes]))
    return [part for part in parts if part]


def sum_over_processes(parameters: Sequence[nn.Parameter], figures: Tensor) -> None:
    """Add up gradients and figures of all processes in place; each sample's share is of the whole step."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    torch.distributed.all_reduce(flat)
    torch.distributed.all_reduce(figures)
    sizes = [p.numel() for p in parameters]
    for parameter, part in zip(parameters, torch.split(flat, sizes), strict=True):
        parameter.grad = part.view_as(parameter)
