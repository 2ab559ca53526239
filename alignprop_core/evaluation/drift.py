"""Drift: the relative distance of the tuned model's predictions from the base model's, on fixed inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from alignprop_core.diffusion.sampler import Sampler

MOST_PROMPTS, MOST_STEPS = 8, 4


class Drift:
    """Relative change of the guided prediction, ||tuned - base|| / ||base||, on fixed inputs.

    The inputs are latents of the base model's own chains: the first prompts (at most 8), each from its own noise, at
    the middle of each quarter of the denoising steps (all steps if there are fewer than 4). The norms are taken over
    all inputs together. 0 is the base model; the prediction is noise or velocity, whichever the model predicts.

    Args:
        sampler: the sampler.
        prompts: held-out prompts.
        base: opens a context in which the model is the base model.
        seed: of the noise.
        batch_size: prompts per call of the model.
    """

    def __init__(
        self,
        sampler: Sampler,
        prompts: Sequence[str],
        base: Callable[[], AbstractContextManager[object]],
        *,
        seed: int,
        batch_size: int = 8,
    ) -> None:
        self.sampler = sampler
        self.prompts = list(prompts[:MOST_PROMPTS])
        self.steps = chosen_steps(sampler.scheduler.steps)
        self._inputs: list[tuple[list[str], int, Tensor, Tensor]] = []
        with base(), torch.no_grad():
            for start in range(0, len(self.prompts), batch_size):
                part = self.prompts[start : start + batch_size]
                self._walk(part, list(range(start, start + len(part))), seed)

    def _walk(self, prompts: list[str], indices: list[int], seed: int) -> None:
        """Denoise with the base model and store latents and predictions, (b, C, h, w), of the chosen steps."""
        sampler = self.sampler
        noise = sampler.noise(prompts, seed=seed, step=0, indices=indices)
        latents = sampler.scheduler.initial_scale * noise.initial.to(sampler.device, sampler.dtype)
        added = None if noise.steps is None else noise.steps.to(sampler.device, sampler.dtype)
        state = sampler.scheduler.initial_state
        # The chain ends after the last chosen step.
        for i in range(self.steps[-1] + 1):
            prediction = sampler.predict(latents, i, prompts)
            if i in self.steps:
                self._inputs.append((prompts, i, latents, prediction))
            latents, state = sampler.scheduler.step(latents, prediction, i, state, None if added is None else added[i])

    def measure(self) -> float:
        """Return the drift of the model with its current adapters."""
        moved, whole = 0.0, 0.0
        for prompts, i, latents, base in self._inputs:
            # Squares are summed in float64 on the CPU; Apple GPUs have no float64.
            before = base.cpu().double()
            change = self.sampler.predict(latents, i, prompts).cpu().double() - before
            moved += float(change.square().sum())
            whole += float(before.square().sum())
        return float((moved / whole) ** 0.5) if whole else 0.0


def chosen_steps(total: int) -> tuple[int, ...]:
    """Return the step numbers at the middle of each quarter of a chain of `total` steps; all steps of fewer than 4."""
    count = min(MOST_STEPS, total)
    return tuple((2 * j + 1) * total // (2 * count) for j in range(count))
