"""Scheduler steps as pure functions: (latents, prediction, step, state, noise) -> (latents, state).

diffusers' schedulers keep state in place and look things up by timestep value, which costs host syncs and makes a
step impossible to recompute. Here every coefficient is worked out once, from diffusers' own tables, and a step is
arithmetic on tensors: it can be checkpointed, repeated and differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from alignprop_core.errors import ModelError

State = tuple[Tensor, ...]
"""What a multistep scheduler carries from step to step; empty for one-step schedulers."""


class Scheduler(Protocol):
    """What the sampler asks of a scheduler."""

    timesteps: Tensor
    steps: int
    needs_noise: bool

    def initial_state(self) -> State:
        """Return the state before the first step."""
        ...

    def step(
        self, latents: Tensor, prediction: Tensor, step: int, state: State, noise: Tensor | None
    ) -> tuple[Tensor, State]:
        """Return latents and state after step number `step` (0 is the noisiest)."""
        ...

    def clean(self, latents: Tensor, prediction: Tensor, step: int) -> Tensor:
        """Return the estimate of the clean latents at this step."""
        ...

    def renoise(self, latents: Tensor, step: int, noise: Tensor) -> Tensor:
        """Return clean latents noised to the level at the start of step number `step`."""
        ...


@dataclass(frozen=True)
class _Coefficients:
    """Scalars of one DDIM step, as 0-dim CPU tensors: mixing them with device tensors needs no sync."""

    sqrt_alpha: Tensor
    sqrt_beta: Tensor
    sqrt_alpha_prev: Tensor
    direction: Tensor
    std: Tensor


class DDIM:
    """Denoising diffusion implicit models (Song et al. 2021, equation 12), as diffusers' `DDIMScheduler` computes it.

    Handles epsilon, v and sample prediction, `clip_sample`, every timestep spacing and zero terminal SNR. The tables
    are diffusers' own, built from the pipeline's scheduler config, and the arithmetic keeps its order, so results are
    equal to the last bit.

    Attributes:
        timesteps: (T,) int64 on the sampler's device, noisiest first.
        needs_noise: whether a step adds fresh noise (eta > 0).
    """

    def __init__(self, config: Any, steps: int, *, eta: float = 0.0, device: torch.device | str = "cpu") -> None:
        table = DDIMScheduler.from_config(config)
        if table.config.thresholding:
            raise ModelError(
                "The model's scheduler uses dynamic thresholding, whose quantile has no useful gradient; "
                "set thresholding to false in its scheduler_config.json."
            )
        if steps > table.config.num_train_timesteps:
            raise ModelError(
                f"sampling.steps is {steps}, but the model was trained with {table.config.num_train_timesteps} "
                "timesteps; use at most that many."
            )
        table.set_timesteps(steps)
        self.steps = steps
        self.needs_noise = eta > 0
        self.prediction_type: str = table.config.prediction_type
        self._clip: float | None = table.config.clip_sample_range if table.config.clip_sample else None
        self._table = [self._coefficients(table, int(t), eta) for t in table.timesteps]
        # Copied once, here, so that the loop never waits for the host.
        self.timesteps: Tensor = table.timesteps.to(device)

    @staticmethod
    def _coefficients(table: Any, timestep: int, eta: float) -> _Coefficients:
        previous = timestep - table.config.num_train_timesteps // table.num_inference_steps
        alpha = table.alphas_cumprod[timestep]
        alpha_prev = table.alphas_cumprod[previous] if previous >= 0 else table.final_alpha_cumprod
        std = eta * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)) ** 0.5
        return _Coefficients(
            sqrt_alpha=alpha**0.5,
            sqrt_beta=(1 - alpha) ** 0.5,
            sqrt_alpha_prev=alpha_prev**0.5,
            direction=(1 - alpha_prev - std**2) ** 0.5,
            std=std,
        )

    def initial_state(self) -> State:
        """DDIM carries nothing from step to step."""
        return ()

    def _split(self, latents: Tensor, prediction: Tensor, c: _Coefficients) -> tuple[Tensor, Tensor]:
        """Return (clean estimate, noise estimate) from the network's prediction."""
        if self.prediction_type == "epsilon":
            clean, epsilon = (latents - c.sqrt_beta * prediction) / c.sqrt_alpha, prediction
        elif self.prediction_type == "v_prediction":
            clean = c.sqrt_alpha * latents - c.sqrt_beta * prediction
            epsilon = c.sqrt_alpha * prediction + c.sqrt_beta * latents
        else:
            clean, epsilon = prediction, (latents - c.sqrt_alpha * prediction) / c.sqrt_beta
        if self._clip is not None:
            clean = clean.clamp(-self._clip, self._clip)
        return clean, epsilon

    def step(
        self, latents: Tensor, prediction: Tensor, step: int, state: State, noise: Tensor | None
    ) -> tuple[Tensor, State]:
        """Take one DDIM step; `noise` (same shape as latents) is read only if eta > 0."""
        c = self._table[step]
        clean, epsilon = self._split(latents, prediction, c)
        previous = c.sqrt_alpha_prev * clean + c.direction * epsilon
        if self.needs_noise and noise is not None:
            previous = previous + c.std * noise
        return previous, state

    def clean(self, latents: Tensor, prediction: Tensor, step: int) -> Tensor:
        """Return the clean estimate at this step (ReFL scores it; Xu et al. 2023, algorithm 1)."""
        return self._split(latents, prediction, self._table[step])[0]

    def renoise(self, latents: Tensor, step: int, noise: Tensor) -> Tensor:
        """Return sqrt(alpha) * latents + sqrt(1 - alpha) * noise at the level of this step."""
        c = self._table[step]
        return c.sqrt_alpha * latents + c.sqrt_beta * noise
