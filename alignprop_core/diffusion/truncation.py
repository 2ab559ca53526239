"""Truncated backpropagation: choose the denoising steps that keep their gradient, once per batch.

Everything before the first kept step runs without an autograd graph; at least one step always keeps its gradient,
whatever the settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alignprop_core.config.model import BackpropConfig
from alignprop_core.diffusion.noise import seeded


@dataclass(frozen=True)
class Truncation:
    """The denoising steps of one batch that keep their gradient.

    A kept step's prediction v enters the scheduler as sg(v) + w (v - sg(v)), and its network sees s x + (1 - s) sg(x)
    instead of the latents x, where sg stops the gradient. w = 1 and s = 1 is the exact chain.

    Attributes:
        kept: step numbers (0 is the noisiest) whose network call keeps its gradient, ascending, never empty.
        output_weights: w of each kept step; empty means 1 for all.
        input_scales: s of each kept step; empty means 1 for all. With 0, only the linear path through the scheduler
            carries gradient past the step (DRTune).
        stop_at: step at which sampling ends with the clean-image estimate (ReFL), or None to run to the end.
        leap_tolerance: weighs each sample by how closely the two kept steps, each extended to the next one, follow the
            chain (LeapAlign): 1 / (max(tolerance, e) + max(tolerance, e')), e and e' the mean absolute differences at
            the ends of both; None weighs all samples alike.
    """

    kept: tuple[int, ...]
    output_weights: tuple[float, ...] = ()
    input_scales: tuple[float, ...] = ()
    stop_at: int | None = None
    leap_tolerance: float | None = None

    @property
    def first(self) -> int:
        """The first step with a gradient; all before it are a no-grad prefix."""
        return self.kept[0]

    @property
    def factors(self) -> dict[int, tuple[float, float]]:
        """Kept step -> (output weight, input scale)."""
        ones = (1.0,) * len(self.kept)
        pairs = zip(self.output_weights or ones, self.input_scales or ones, strict=True)
        return dict(zip(self.kept, pairs, strict=True))


def draw_truncation(config: BackpropConfig, sizes: Sequence[float], *, seed: int, step: int) -> Truncation:
    """Draw the truncation of a training step; the same on every process and for every chunk of the batch.

    - `last_k`: the last K steps (DRaFT-K; Clark et al. 2024, section 4.2).
    - `uniform`: the last K steps, K uniform over 1..T (AlignProp; Prabhudesai et al. 2023, section 4).
    - `gaussian`: the last K steps, K a rounded normal draw clipped to 1..T.
    - `full`: all steps, the gradient of the whole chain.
    - `drtune`: K evenly spaced steps from a random offset, network input detached (Wu et al. 2024, algorithm 1).
    - `refl`: the clean-image estimate at one random late step (Xu et al. 2023, algorithm 1).
    - `bernoulli`: each step with a fixed probability; if that leaves none, one step drawn uniformly.
    - `sparse`: K steps drawn with probability proportional to (i + 1)^late_bias, network input detached; the output
      weights make up for the dropped steps (FlowBP-Sparse, arXiv:2606.11075).
    - `bridge`: K steps on both sides of a random step j, drawn as with `sparse`, where j is kept and sees the latents
      with the input scale (FlowBP-Bridge).
    - `leap`: two random steps k < j, each extended to the next one by its output weight, j with the input scale
      (LeapAlign, arXiv:2604.15311).

    Args:
        config: the `backprop` section of the run config.
        sizes: how far each of the T steps moves the final latents per unit of its prediction (`step_sizes`).
        seed: the run's seed.
        step: the training step.
    """
    generator, steps = seeded(seed, "cut", step), len(sizes)

    def uniform(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def last(count: int) -> Truncation:
        return Truncation(tuple(range(steps - max(1, min(count, steps)), steps)))

    def late(start: int, stop: int, count: int) -> list[int]:
        """Draw `count` different steps of [start, stop), later ones more often."""
        if count < 1:
            return []
        bias = 2.0 if config.late_bias is None else config.late_bias
        weights = torch.arange(1, stop - start + 1, dtype=torch.float64) ** bias
        return sorted(start + i for i in torch.multinomial(weights, count, generator=generator).tolist())

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
            return Truncation(tuple(offset + i * spacing for i in range(count)), input_scales=(0.0,) * count)
        case "refl":
            count = max(1, min(config.refl_steps or -(-steps // 4), steps))
            kept = uniform(steps - count, steps - 1)
            return Truncation((kept,), stop_at=kept)
        case "bernoulli":
            probability = 0.5 if config.keep_probability is None else config.keep_probability
            # One mask for the whole batch: every sample keeps the same steps.
            draws = torch.rand(steps, generator=generator, dtype=torch.float64).tolist()
            kept_steps = tuple(i for i, draw in enumerate(draws) if draw < probability)
            return Truncation(kept_steps or (uniform(0, steps - 1),))
        case "sparse":
            kept_late = late(0, steps, min(config.k or 3, steps))
            return Truncation(tuple(kept_late), _rescaled(kept_late, sizes, config), (0.0,) * len(kept_late))
        case "bridge" if steps > 1:
            # j has steps on both sides, and the budget is divided in proportion to their numbers; j itself is kept.
            j, budget = uniform(1, steps - 1), max(2, min(config.k or 5, steps))
            after = min(max(budget - round(budget * j / steps), 1), steps - j)
            before = min(max(budget - after, 1), j)
            both = [*late(0, j, before), j, *late(j + 1, steps, min(budget - before, steps - j) - 1)]
            scales = tuple(_scale(config, 0.1) if i == j else 0.0 for i in both)
            return Truncation(tuple(both), _rescaled(both, sizes, config), scales)
        case "leap" if steps > 1:
            k, j = sorted(torch.randperm(steps, generator=generator)[:2].tolist())
            weights = tuple(
                sum(sizes[start:stop]) / sizes[start] if sizes[start] else 1.0 for start, stop in ((k, j), (j, steps))
            )
            tolerance = 0.1 if config.leap_tolerance is None else config.leap_tolerance
            return Truncation((k, j), weights, (0.0, _scale(config, 0.3)), leap_tolerance=tolerance)
        case _:
            return last(1)  # a chain of one step has nothing between two steps


def _rescaled(kept: Sequence[int], sizes: Sequence[float], config: BackpropConfig) -> tuple[float, ...]:
    """Return the output weight that makes up for dropped steps: 1 + rescale (sum of all |sizes| / kept ones' - 1)."""
    total, own = sum(map(abs, sizes)), sum(abs(sizes[i]) for i in kept)
    rescale = 1.0 if config.rescale is None else config.rescale
    return (1 + rescale * (total / own - 1) if own else 1.0,) * len(kept)


def _scale(config: BackpropConfig, default: float) -> float:
    return default if config.input_scale is None else config.input_scale
