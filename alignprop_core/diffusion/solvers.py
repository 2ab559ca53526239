"""Euler, Euler ancestral, DPM-Solver++ (2M) and LCM: steps that are linear in latents, prediction, history and noise.

diffusers' Euler schedulers keep latents as clean + sigma * noise and divide them by sqrt(sigma^2 + 1) before every call
of the network. Here latents are stored divided, as alpha * clean + s * noise with alpha^2 + s^2 = 1 (variance
preserving): they are the network's input, and every scheduler has the same form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import exp, hypot, log, sqrt
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)
from torch import Tensor

from alignprop_core.diffusion.schedulers import State
from alignprop_core.diffusion.tables import diffusers_tables, require_signal
from alignprop_core.errors import ModelError

_FEW = 15
"""Below so many steps, `lower_order_final` of diffusers' DPM-Solver++ has an effect."""


@dataclass(frozen=True)
class _Step:
    """Factors of one step, Python numbers: multiplying with them needs no sync and keeps the latents' precision.

    Attributes:
        level: alpha and s, of the latents before the step.
        clean: of latents and prediction, for the clean estimate.
        mean: of latents and prediction, for the result without its noise and without history.
        quiet: the same for the step that ends at the same noise level without adding noise.
        std: of the noise.
        history: of the difference between this clean estimate and the one before.
    """

    level: tuple[float, float]
    clean: tuple[float, float]
    mean: tuple[float, float]
    quiet: tuple[float, float]
    std: float
    history: float


class Solver:
    """A scheduler of diffusers whose steps are linear, over its own timesteps and noise levels.

    With the clean estimate x, the noise estimate e = (latents - alpha x) / s and the next levels alpha', s':

    - `EulerDiscreteScheduler`: alpha' x + s' e (Karras et al. 2022, algorithm 1 without churn; equal to DDIM).
    - `EulerAncestralDiscreteScheduler`: alpha' x + d e + sqrt(s'^2 - d^2) noise, with d = s' sigma' / sigma and
      sigma = s / alpha.
    - `DPMSolverMultistepScheduler`: Euler's with the extrapolation x + w (x - the last x) instead of x (Lu et al. 2022,
      https://arxiv.org/abs/2211.01095, algorithm 2).
    - `LCMScheduler`: alpha' x + s' noise, where x is the boundary-corrected c_out x + c_skip latents (Luo et al. 2023,
      https://arxiv.org/abs/2310.04378, equation 9).

    Args:
        kind: the class in diffusers.
        config: options of that class (`families.scheduler_config`).
        steps: number of denoising steps T.
        device: where `timesteps` is needed.

    Raises:
        ModelError: diffusers refuses the options, or cannot take so many steps.
    """

    def __init__(
        self, kind: type, config: Mapping[str, Any], steps: int, *, device: torch.device | str = "cpu"
    ) -> None:
        table = diffusers_tables(kind, config, steps)
        self.steps = len(table.timesteps)
        self.timesteps: Tensor = table.timesteps.to(device)
        self.initial_state: State = ()
        levels = _levels(table)[: self.steps + 1]  # with log_linear interpolation, diffusers has one too many
        self.initial_scale = float(table.init_noise_sigma)
        if isinstance(table, EulerDiscreteScheduler | EulerAncestralDiscreteScheduler):
            self.initial_scale *= levels[0][0]
            # The decoder gets the final latents of diffusers, which are not divided.
            levels[-1] = (1.0, levels[-1][1] / levels[-1][0])
        require_signal(table.config.prediction_type, [alpha for alpha, _ in levels])
        if any(s * alpha <= s_next * alpha_ for (alpha_, s), (alpha, s_next) in pairwise(levels[:-1])):
            raise ModelError(
                f"sampling.steps is {steps}, of which two have the same noise level with the model's timestep_spacing "
                f"({table.config.get('timestep_spacing')}); use fewer."
            )
        multistep = isinstance(table, DPMSolverMultistepScheduler)
        extrapolations = _extrapolations(table) if multistep else [0.0] * self.steps
        self._multistep = any(extrapolations)
        self._table = [
            _step(table, i, before, after, weight)
            for i, ((before, after), weight) in enumerate(zip(pairwise(levels), extrapolations, strict=True))
        ]
        self.needs_noise = any(step.std for step in self._table)

    def step(
        self, latents: Tensor, prediction: Tensor, step: int, state: State, noise: Tensor | None
    ) -> tuple[Tensor, State]:
        """Take one step; the state of DPM-Solver++ is the clean estimate. Without a state it does not extrapolate."""
        c = self._table[step]
        of_latents, of_prediction = c.quiet if noise is None else c.mean
        result = of_latents * latents + of_prediction * prediction
        if c.std and noise is not None:
            result = result + c.std * noise
        if not self._multistep:
            return result, state
        clean = self.clean(latents, prediction, step)
        if c.history and state:
            result = result + c.history * (clean - state[0])
        return result, (clean,)

    def slope(self, step: int) -> float | None:
        """Return the derivative of a step's latents by those before it; None if the step extrapolates."""
        return None if self._table[step].history else self._table[step].mean[0]

    def clean(self, latents: Tensor, prediction: Tensor, step: int) -> Tensor:
        """Return the clean estimate at this step; with LCM, with its boundary correction."""
        of_latents, of_prediction = self._table[step].clean
        return of_latents * latents + of_prediction * prediction

    def renoise(self, latents: Tensor, step: int, noise: Tensor) -> Tensor:
        """Return alpha * latents + s * noise at the level of this step."""
        alpha, s = self._table[step].level
        return alpha * latents + s * noise


def _levels(table: Any) -> list[tuple[float, float]]:
    """Return alpha and s before every step and after the last."""
    if isinstance(table, LCMScheduler):
        alphas = [float(table.alphas_cumprod[t]) for t in table.timesteps]
        return [(sqrt(alpha), sqrt(1 - alpha)) for alpha in [*alphas, 1.0]]
    return [(1 / hypot(1, sigma), sigma / hypot(1, sigma)) for sigma in table.sigmas.tolist()]


def _extrapolations(table: Any) -> list[float]:
    """Return w of every step of DPM-Solver++ (2M): 0 in the first, and in the last where diffusers lowers the order."""
    config, sigmas = table.config, table.sigmas.tolist()
    steps = len(sigmas) - 1
    lowered = config.euler_at_final or config.final_sigmas_type == "zero"
    weights = [0.0] * steps
    for i in range(1, steps):
        if i == steps - 1 and (lowered or (config.lower_order_final and steps < _FEW)):
            break
        # Differences of lambda = log(alpha / s), of this step and of the one before.
        h, before = log(sigmas[i] / sigmas[i + 1]), log(sigmas[i - 1] / sigmas[i])
        if h:
            weights[i] = (0.5 if config.solver_type == "midpoint" else 1 / (1 - exp(-h)) - 1 / h) * h / before
    return weights


def _step(table: Any, number: int, before: tuple[float, float], after: tuple[float, float], weight: float) -> _Step:
    """Return the factors of a step between two levels."""
    (alpha, s), (alpha_next, s_next) = before, after
    clean, direction = (0.0, 1.0), s_next
    if table.config.prediction_type == "epsilon":
        clean = (1 / alpha, -s / alpha)
    elif table.config.prediction_type == "v_prediction":
        clean = (alpha, -s)
    if isinstance(table, LCMScheduler):
        skip, out = table.get_scalings_for_boundary_condition_discrete(int(table.timesteps[number]))
        clean, direction = (out * clean[0] + skip, out * clean[1]), 0.0
    elif isinstance(table, EulerAncestralDiscreteScheduler):
        direction = s_next * (s_next / alpha_next) / (s / alpha)

    def result(direction: float) -> tuple[float, float, float]:
        # alpha' x + direction (latents - alpha x) / s, and its derivative by the clean estimate x
        of_clean = alpha_next - direction * alpha / s
        return of_clean * clean[0] + direction / s, of_clean * clean[1], of_clean

    *mean, of_clean = result(direction)
    *quiet, _ = result(s_next)
    std = sqrt(s_next**2 - direction**2)
    return _Step(before, clean, (mean[0], mean[1]), (quiet[0], quiet[1]), std, weight * of_clean)
