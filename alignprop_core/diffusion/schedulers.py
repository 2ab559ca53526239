"""Scheduler steps as pure functions: (latents, prediction, step, state, noise) -> (latents, state).

diffusers' schedulers change state in place and look up coefficients by timestep value, which costs host syncs and
makes a step impossible to recompute. Here all coefficients are computed once, from diffusers' own tables, and a step is
arithmetic on tensors: it can be checkpointed, repeated and differentiated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from alignprop_core.diffusion.tables import diffusers_tables, require_signal
from alignprop_core.errors import ModelError, complaint

State = tuple[Tensor, ...]
"""Tensors that a multistep scheduler passes from step to step; empty for one-step schedulers."""


class Scheduler(Protocol):
    """The interface between the sampler and a scheduler.

    Attributes:
        timesteps: (T,) on the sampler's device, noisiest first: int64, or float32 for Euler schedulers.
        steps: T.
        needs_noise: whether `step` adds fresh noise.
        initial_state: the state before the first step.
        initial_scale: standard deviation of the first latents: they are this times standard normal noise.
    """

    timesteps: Tensor
    steps: int
    needs_noise: bool
    initial_state: State
    initial_scale: float

    def step(
        self, latents: Tensor, prediction: Tensor, step: int, state: State, noise: Tensor | None
    ) -> tuple[Tensor, State]:
        """Return latents, (B, C, h, w), and state after a step.

        Args:
            latents: (B, C, h, w), before the step.
            prediction: (B, C, h, w), the network's guided output at these latents.
            step: number of the step; 0 is the noisiest.
            state: what the step before returned.
            noise: (B, C, h, w), standard normal; read only if `needs_noise`. None takes the step of the same length
                that adds none.
        """
        ...

    def slope(self, step: int) -> float | None:
        """Return the derivative of a step's latents by those before it, the prediction a constant.

        None if it is not the same for all latents, or if the step depends on a state.
        """
        ...

    def clean(self, latents: Tensor, prediction: Tensor, step: int) -> Tensor:
        """Return the estimate of the clean latents, (B, C, h, w), at this step."""
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
    sqrt_beta_prev: Tensor


def step_sizes(scheduler: Scheduler) -> list[float]:
    """Return how far each step moves the final latents per unit of its prediction, along the linear path: T numbers.

    It is the derivative of the final latents at step i's prediction when all later predictions are constants: for flow
    matching sigma's difference; for DDIM the difference of sigma = sqrt(1 - alpha) / sqrt(alpha), times the factor
    between latents and their scaled form (docs/concepts). Works for multistep schedulers as well.
    """
    with torch.enable_grad():
        probes = [torch.zeros((1, 1, 1, 1), dtype=torch.float64, requires_grad=True) for _ in range(scheduler.steps)]
        latents, state, noise = torch.zeros_like(probes[0]), scheduler.initial_state, torch.zeros_like(probes[0])
        for i, probe in enumerate(probes):
            latents, state = scheduler.step(latents, probe, i, state, noise)
        return [float(size) for size in torch.autograd.grad(latents.sum(), probes)]


class DDIM:
    """Denoising diffusion implicit models (Song et al. 2021, equation 12), as diffusers' `DDIMScheduler` computes them.

    Supports epsilon, v and sample prediction, `clip_sample`, every timestep spacing and zero terminal SNR. The tables
    are diffusers' own, and the arithmetic keeps its order, so results are equal to the last bit.

    Args:
        config: options of diffusers' `DDIMScheduler` (`families.scheduler_config`).
        steps: number of denoising steps T.
        eta: 0 is deterministic, 1 adds the noise of DDPM.
        device: where `timesteps` is needed.

    Raises:
        ModelError: diffusers refuses the options, or there are fewer timesteps than `steps`.
    """

    def __init__(
        self, config: Mapping[str, Any], steps: int, *, eta: float = 0.0, device: torch.device | str = "cpu"
    ) -> None:
        table = diffusers_tables(DDIMScheduler, config, steps)
        self.steps = steps
        self.needs_noise = eta > 0
        self.initial_state: State = ()
        self.initial_scale = 1.0
        self.prediction_type: str = table.config.prediction_type
        self._clip: float | None = table.config.clip_sample_range if table.config.clip_sample else None
        self._table = [self._coefficients(table, int(t), eta) for t in table.timesteps]
        require_signal(self.prediction_type, [c.sqrt_alpha for c in self._table])
        # Copied once, here, so that the loop never waits for the host.
        self.timesteps: Tensor = table.timesteps.to(device)

    @staticmethod
    def _coefficients(table: Any, timestep: int, eta: float) -> _Coefficients:
        # A table lookup by arithmetic on Python numbers: the step before this one, or the final alpha past the end.
        previous = timestep - table.config.num_train_timesteps // table.num_inference_steps
        alpha = table.alphas_cumprod[timestep]
        alpha_prev = table.alphas_cumprod[previous] if previous >= 0 else table.final_alpha_cumprod
        # Equation 16: sigma of the added noise, and what remains of the variance for the direction.
        std = eta * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)) ** 0.5
        return _Coefficients(
            sqrt_alpha=alpha**0.5,
            sqrt_beta=(1 - alpha) ** 0.5,
            sqrt_alpha_prev=alpha_prev**0.5,
            # Rounding can make this slightly negative with eta = 1.
            direction=(1 - alpha_prev - std**2).clamp(min=0) ** 0.5,
            std=std,
            sqrt_beta_prev=(1 - alpha_prev) ** 0.5,
        )

    def _split(self, latents: Tensor, prediction: Tensor, c: _Coefficients) -> tuple[Tensor, Tensor]:
        """Return estimates of the clean latents and of the noise, both (B, C, h, w), from the network's prediction.

        Both solve latents = sqrt_alpha * clean + sqrt_beta * epsilon, with v = sqrt_alpha * epsilon - sqrt_beta * clean
        (Salimans & Ho 2022, appendix D).
        """
        if self.prediction_type == "epsilon":
            clean, epsilon = (latents - c.sqrt_beta * prediction) / c.sqrt_alpha, prediction
        elif self.prediction_type == "v_prediction":
            clean = c.sqrt_alpha * latents - c.sqrt_beta * prediction
            epsilon = c.sqrt_alpha * prediction + c.sqrt_beta * latents
        else:
            clean, epsilon = prediction, (latents - c.sqrt_alpha * prediction) / c.sqrt_beta
        if self._clip is not None:
            # As in diffusers, the noise estimate is not recomputed from the clipped clean latents.
            clean = clean.clamp(-self._clip, self._clip)
        return clean, epsilon

    def step(
        self, latents: Tensor, prediction: Tensor, step: int, state: State, noise: Tensor | None
    ) -> tuple[Tensor, State]:
        """Take one DDIM step; `noise` (same shape as latents) is read only if eta > 0."""
        c = self._table[step]
        clean, epsilon = self._split(latents, prediction, c)
        # Equation 12: the clean estimate, the direction back to the current latents, and fresh noise.
        if not self.needs_noise or noise is None:
            return c.sqrt_alpha_prev * clean + c.sqrt_beta_prev * epsilon, state
        return c.sqrt_alpha_prev * clean + c.direction * epsilon + c.std * noise, state

    def slope(self, step: int) -> float | None:
        """Return the derivative of a step's latents by those before it; None with clipping."""
        c = self._table[step]
        if self._clip is not None:
            return None
        alpha, beta = float(c.sqrt_alpha), float(c.sqrt_beta)
        # Of the two estimates of `_split`, by the latents.
        clean, epsilon = {
            "epsilon": (1 / alpha, 0.0),
            "v_prediction": (alpha, beta),
        }.get(self.prediction_type, (0.0, 1 / beta))
        return float(c.sqrt_alpha_prev) * clean + float(c.direction) * epsilon

    def clean(self, latents: Tensor, prediction: Tensor, step: int) -> Tensor:
        """Return the clean estimate at this step (ReFL scores it; Xu et al. 2023, algorithm 1)."""
        return self._split(latents, prediction, self._table[step])[0]

    def renoise(self, latents: Tensor, step: int, noise: Tensor) -> Tensor:
        """Return sqrt(alpha) * latents + sqrt(1 - alpha) * noise at the level of this step."""
        c = self._table[step]
        return c.sqrt_alpha * latents + c.sqrt_beta * noise


class FlowMatchEuler:
    """Euler's method for the flow from noise to images, as diffusers' `FlowMatchEulerDiscreteScheduler` computes it.

    Latents are (1 - sigma) * clean + sigma * noise, and the network predicts the velocity, noise - clean (Esser et al.
    2024, https://arxiv.org/abs/2403.03206, section 2). The sigmas are diffusers' own, so results are equal to the last
    bit.

    Args:
        config: the config of diffusers' `FlowMatchEulerDiscreteScheduler`.
        steps: number of denoising steps T.
        mu: for the shift of the sigmas that depends on the image's size (`use_dynamic_shifting`); None without it.
        sigmas: T of them, before the shift; None for the scheduler's own.
        device: where `timesteps` is needed.

    Raises:
        ModelError: diffusers refuses the options, or steps add noise.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        steps: int,
        *,
        mu: float | None = None,
        sigmas: Sequence[float] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if config.get("stochastic_sampling"):
            raise ModelError(
                "The model's scheduler adds noise at every step (stochastic_sampling: true), which alignprop does not "
                "do with flow matching; set it to false in the model's scheduler_config.json."
            )
        try:
            table = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
            table.set_timesteps(steps, mu=mu, sigmas=sigmas)
        except (ValueError, TypeError, ArithmeticError, RuntimeError, ImportError) as error:
            raise ModelError(f"The model's scheduler_config.json cannot be used: {complaint(error)}.") from error
        self.steps = steps
        self.needs_noise = False
        self.initial_state: State = ()
        self.initial_scale = 1.0
        self._sigmas: Tensor = table.sigmas.cpu()  # T + 1; 0-dim CPU tensors mix with device tensors without a sync
        self.timesteps: Tensor = table.timesteps.to(device)

    def step(
        self, latents: Tensor, prediction: Tensor, step: int, state: State, noise: Tensor | None
    ) -> tuple[Tensor, State]:
        """Move along the velocity to the next sigma; `noise` is not read."""
        return latents + (self._sigmas[step + 1] - self._sigmas[step]) * prediction, state

    def slope(self, step: int) -> float:
        """Return 1: a step adds to the latents."""
        return 1.0

    def clean(self, latents: Tensor, prediction: Tensor, step: int) -> Tensor:
        """Return latents - sigma * velocity."""
        return latents - self._sigmas[step] * prediction

    def renoise(self, latents: Tensor, step: int, noise: Tensor) -> Tensor:
        """Return (1 - sigma) * latents + sigma * noise at the level of this step."""
        return (1 - self._sigmas[step]) * latents + self._sigmas[step] * noise
