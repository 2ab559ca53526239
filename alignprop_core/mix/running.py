"""Running figures of a term's scores and gradient, by which a mix brings terms to a common size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

OUTLIER = 10.0
"""How many times its usual size a step's gradient may count as, unless the step before was as large."""


@dataclass
class Running:
    """Exponentially decaying means over the steps of a run, each step's figure being that of its whole batch.

    Sums are kept undivided with the sum of their weights, so the first steps count in full (as in Adam's correction).

    Attributes:
        mass: sum of the weights, 1 - decay^n after n steps.
        score: decaying sum of the step means of the raw scores.
        score_square: of their squares.
        gradient_square: of the squared batch gradient norm.
        highest_spread: the largest standard deviation there has been.
        highest_gradient: the largest root mean square of the gradient norm there has been.
        outliers: how many steps up to now, in a row, had a gradient over `OUTLIER` times the usual.
    """

    mass: float = 0.0
    score: float = 0.0
    score_square: float = 0.0
    gradient_square: float = 0.0
    highest_spread: float = 0.0
    highest_gradient: float = 0.0
    outliers: float = 0.0

    @property
    def spread(self) -> float:
        """Running standard deviation of the raw scores; 0 before the first step."""
        if not self.mass:
            return 0.0
        mean, square = self.score / self.mass, self.score_square / self.mass
        variance = square - mean * mean
        # Below the rounding of the two means there is no spread, only noise.
        return math.sqrt(variance) if variance > 1e-12 * square else 0.0

    @property
    def gradient(self) -> float:
        """Running root mean square of the batch gradient norm; 0 before the first step."""
        return math.sqrt(self.gradient_square / self.mass) if self.mass else 0.0

    def add(self, score: float, score_square: float, gradient_square: float, decay: float) -> None:
        """Take in one step's figures; those of a step with anything that is not finite are left out."""
        if not all(math.isfinite(value) for value in (score, score_square, gradient_square)):
            return
        # One wild step must not mute a term for the rest of the run, which `highest_gradient` would; two are a change.
        limit = (OUTLIER * self.gradient) ** 2
        self.outliers = self.outliers + 1 if 0 < limit < gradient_square else 0.0
        if self.outliers == 1:
            gradient_square = limit
        self.mass = decay * self.mass + (1 - decay)
        self.score = decay * self.score + (1 - decay) * score
        self.score_square = decay * self.score_square + (1 - decay) * score_square
        self.gradient_square = decay * self.gradient_square + (1 - decay) * gradient_square
        self.highest_spread = max(self.highest_spread, self.spread)
        self.highest_gradient = max(self.highest_gradient, self.gradient)

    def as_json(self) -> dict[str, float]:
        """Return the state for a checkpoint; Python writes and reads floats in JSON without loss."""
        return asdict(self)

    @classmethod
    def from_json(cls, state: Mapping[str, float]) -> Running:
        """Return what `as_json` wrote."""
        return cls(**{name: float(value) for name, value in state.items()})


def one_over(size: float, highest: float, floor: float) -> float:
    """Return 1 / max(size, floor * highest): what brings a term to size 1; 0 where there never was any size."""
    held = max(size, floor * highest)
    return 1 / held if held > 0 else 0.0
