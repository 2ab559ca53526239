"""Running statistics of a term's scores and gradient, which bring the terms of a mix to a common scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

OUTLIER = 10.0
"""Limit on one step's gradient, as a multiple of the running one, unless the step before was as large."""


@dataclass
class Running:
    """Exponential moving averages over the steps of a run; each step counts with the statistics of its whole batch.

    Sums are stored with the sum of their weights, `mass`; dividing by it corrects the bias of the first steps, as Adam
    does (Kingma & Ba 2015, section 3).

    Attributes:
        mass: sum of the weights, 1 - decay^n after n steps.
        score: decaying sum of the step means of the raw scores.
        score_square: of their squares.
        gradient_square: of the squared batch gradient norm.
        highest_std: the largest running standard deviation so far.
        highest_gradient: the largest running root mean square of the gradient norm so far.
        outliers: number of consecutive latest steps with a gradient above `OUTLIER` times the running one.
    """

    mass: float = 0.0
    score: float = 0.0
    score_square: float = 0.0
    gradient_square: float = 0.0
    highest_std: float = 0.0
    highest_gradient: float = 0.0
    outliers: float = 0.0

    @property
    def std(self) -> float:
        """Running standard deviation of the raw scores; 0 before the first step."""
        if not self.mass:
            return 0.0
        mean, square = self.score / self.mass, self.score_square / self.mass
        variance = square - mean * mean
        # Below the rounding error of the two means the difference is noise.
        return math.sqrt(variance) if variance > 1e-12 * square else 0.0

    @property
    def gradient(self) -> float:
        """Running root mean square of the batch gradient norm; 0 before the first step."""
        return math.sqrt(self.gradient_square / self.mass) if self.mass else 0.0

    def add(self, score: float, score_square: float, gradient_square: float, decay: float) -> None:
        """Add one step's statistics; a step with NaN or infinity is ignored."""
        if not all(math.isfinite(value) for value in (score, score_square, gradient_square)):
            return
        # One outlier must not mute a term for the rest of the run through `highest_gradient`; two in a row are real.
        limit = (OUTLIER * self.gradient) ** 2
        self.outliers = self.outliers + 1 if 0 < limit < gradient_square else 0.0
        if self.outliers == 1:
            gradient_square = limit
        self.mass = decay * self.mass + (1 - decay)
        self.score = decay * self.score + (1 - decay) * score
        self.score_square = decay * self.score_square + (1 - decay) * score_square
        self.gradient_square = decay * self.gradient_square + (1 - decay) * gradient_square
        self.highest_std = max(self.highest_std, self.std)
        self.highest_gradient = max(self.highest_gradient, self.gradient)

    def as_json(self) -> dict[str, float]:
        """Return the state for a checkpoint; Python writes and reads floats in JSON without loss."""
        return asdict(self)

    @classmethod
    def from_json(cls, state: Mapping[str, float]) -> Running:
        """Return what `as_json` wrote."""
        # `highest_spread` is the name in checkpoints of earlier versions.
        return cls(**{name.replace("spread", "std"): float(value) for name, value in state.items()})


def one_over(size: float, highest: float, floor: float) -> float:
    """Return 1 / max(size, floor * highest): the factor that scales a term to 1; 0 if all were zero so far."""
    scale = max(size, floor * highest)
    return 1 / scale if scale > 0 else 0.0
