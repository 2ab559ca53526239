"""Truncated backpropagation: choose the denoising steps that keep their gradient, once per batch.

Everything before the first kept step runs without an autograd graph; at least one step always keeps its gradient,
whatever the settings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from alignprop_core.config.model import BackpropConfig
from alignprop_core.diffusion.noise import seeded


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


def draw_truncation(config: BackpropConfig, steps: int, *, seed: int, step: int) -> Truncation:
    """Draw the truncation of a training step; the same on every process and for every chunk of the batch.

    - `last_k`: the last K steps (DRaFT-K; Clark et al. 2024, section 4.2).
    - `uniform`: the last K steps, K uniform over 1..T (AlignProp; Prabhudesai et al. 2023, section 4).
    - `gaussian`: the last K steps, K a rounded normal draw clipped to 1..T.
    - `full`: all steps, the gradient of the whole chain.
    - `drtune`: K evenly spaced steps from a random offset, network input detached (Wu et al. 2024, algorithm 1).
    - `refl`: the clean-image estimate at one random late step (Xu et al. 2023, algorithm 1).
    - `bernoulli`: each step with a fixed probability; if that leaves none, one step drawn uniformly.

    Args:
        config: the `backprop` section of the run config.
        steps: number of denoising steps T.
        seed: the run's seed.
        step: the training step.
    """
    generator = seeded(seed, "cut", step)

    def uniform(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def last(count: int) -> Truncation:
        return Truncation(tuple(range(steps - max(1, min(count, steps)), steps)))

    match config.strategy:
        case "last_k":
            return last(config.k or 1)
        case "uniform":
            return last(uniform(1, steps))
        case "gaussian":
            mean = steps / 2 if config.mean is None else config.mean
            std = steps / 6 if config.std is None else config.std
            return last(round(mean + std * float(torch.randn((), generator=generator, dtype=torch.float64))))
        case "full":
            return last(steps)
        case "drtune":
            count = max(1, min(config.k or 1, steps))
            spacing = steps // count
            # The remainder of the division belongs to the offset's range, so that every step can be chosen.
            offset = uniform(0, steps - 1 - (count - 1) * spacing)
            return Truncation(tuple(offset + i * spacing for i in range(count)), detach_input=True)
        case "refl":
            late = max(1, min(config.refl_steps or -(-steps // 4), steps))
            kept = uniform(steps - late, steps - 1)
            return Truncation((kept,), stop_at=kept)
        case "bernoulli":
            probability = 0.5 if config.keep_probability is None else config.keep_probability
            # One mask for the whole batch: every sample keeps the same steps.
            draws = torch.rand(steps, generator=generator, dtype=torch.float64).tolist()
            kept_steps = tuple(i for i, draw in enumerate(draws) if draw < probability)
            return Truncation(kept_steps or (uniform(0, steps - 1),))
