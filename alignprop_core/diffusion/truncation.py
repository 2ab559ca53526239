"""Truncated backpropagation: choose the denoising steps that keep their gradient, once per batch.

A strategy turns the number of steps and a random generator into a `Truncation`. Everything before the first kept step
runs without an autograd graph; at least one step always keeps its gradient, whatever the settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from alignprop_core.config.model import BackpropConfig


@dataclass(frozen=True)
class Truncation:
    """The denoising steps of one batch that keep their gradient.

    Attributes:
        kept: step numbers (0 is the noisiest) whose network call keeps its gradient, ascending, never empty.
        detach_input: whether the network sees detached latents, so that only the linear path through the scheduler
            carries gradient from step to step (DRTune).
        stop_at: step at which sampling ends with the clean-image estimate (ReFL), or None to run to the end.
    """

    kept: tuple[int, ...]
    detach_input: bool = False
    stop_at: int | None = None

    @property
    def first(self) -> int:
        """The first step with a graph; all before it are a no-grad prefix."""
        return self.kept[0]


def _uniform(low: int, high: int, generator: torch.Generator) -> int:
    """Draw an integer from {low, ..., high}."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def _last(count: int, steps: int) -> tuple[int, ...]:
    return tuple(range(steps - max(1, min(count, steps)), steps))


def _last_k(config: BackpropConfig, steps: int, generator: torch.Generator) -> Truncation:
    """DRaFT-K (Clark et al. 2024, section 4.2): the last K steps."""
    return Truncation(_last(config.k or 1, steps))


def _uniform_k(config: BackpropConfig, steps: int, generator: torch.Generator) -> Truncation:
    """AlignProp (Prabhudesai et al. 2023, section 4): the last K steps, K uniform over 1..T, drawn once per batch."""
    return Truncation(_last(_uniform(1, steps, generator), steps))


def _gaussian_k(config: BackpropConfig, steps: int, generator: torch.Generator) -> Truncation:
    """The last K steps, K a rounded normal draw clipped to 1..T."""
    mean = steps / 2 if config.mean is None else config.mean
    std = steps / 6 if config.std is None else config.std
    draw = mean + std * float(torch.randn((), generator=generator, dtype=torch.float64))
    return Truncation(_last(round(draw), steps))


def _full(config: BackpropConfig, steps: int, generator: torch.Generator) -> Truncation:
    """All steps: the gradient of the whole chain."""
    return Truncation(_last(steps, steps))


def _drtune(config: BackpropConfig, steps: int, generator: torch.Generator) -> Truncation:
    """DRTune (Wu et al. 2024, algorithm 1): K evenly spaced steps from a random offset, network input detached."""
    count = max(1, min(config.k or 1, steps))
    spacing = steps // count
    # The remainder of the division belongs to the offset's range, so that every step can be chosen.
    offset = _uniform(0, steps - 1 - (count - 1) * spacing, generator)
    return Truncation(tuple(offset + i * spacing for i in range(count)), detach_input=True)


def _refl(config: BackpropConfig, steps: int, generator: torch.Generator) -> Truncation:
    """ReFL (Xu et al. 2023, algorithm 1): the clean-image estimate at one random late step."""
    late = max(1, min(config.refl_steps or -(-steps // 4), steps))
    step = _uniform(steps - late, steps - 1, generator)
    return Truncation((step,), stop_at=step)


def _bernoulli(config: BackpropConfig, steps: int, generator: torch.Generator) -> Truncation:
    """Keep each step with a fixed probability; if that leaves none, one step drawn uniformly."""
    probability = 0.5 if config.keep_probability is None else config.keep_probability
    draws = torch.rand(steps, generator=generator, dtype=torch.float64)
    # One mask for the whole batch: every sample keeps the same steps.
    kept = tuple(i for i, draw in enumerate(draws.tolist()) if draw < probability)
    return Truncation(kept or (_uniform(0, steps - 1, generator),))


STRATEGIES: dict[str, Callable[[BackpropConfig, int, torch.Generator], Truncation]] = {
    "last_k": _last_k,
    "uniform": _uniform_k,
    "gaussian": _gaussian_k,
    "full": _full,
    "drtune": _drtune,
    "refl": _refl,
    "bernoulli": _bernoulli,
}


def draw_truncation(config: BackpropConfig, steps: int, generator: torch.Generator) -> Truncation:
    """Draw the truncation of one batch.

    Args:
        config: the `backprop` section of the run config.
        steps: number of denoising steps T.
        generator: a CPU generator; the same state gives the same truncation.
    """
    return STRATEGIES[config.strategy](config, steps, generator)
