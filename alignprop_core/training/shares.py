"""A warning for terms that do not influence a run because another term's gradient is much larger."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from alignprop_core.mix.stats import StepStats
from alignprop_core.training.callback import Callback

if TYPE_CHECKING:
    from alignprop_core.training.trainer import Trainer

FEWEST, MOST = 3, 5
"""Steps that count: the first ones, and how many a run needs to have."""

SMALL, RATIO = 0.005, 20
"""Shares below this are shown as 0%. A gradient that is not this much smaller has no share because of its direction."""


class Shares(Callback):
    """Warns once about terms whose share of the gradient is 0% at each of the first steps."""

    def __init__(self) -> None:
        self.steps, self.ratios = 0, dict[str, list[float]]()

    def on_step(self, trainer: Trainer, stats: StepStats) -> None:
        """Count a step, and warn after the last one that counts."""
        sizes = {label: abs(term["factor"] or 0) * (term["grad_norm"] or 0) for label, term in stats.terms.items()}
        largest = max(sizes.values())
        if self.steps == MOST or not largest:
            return
        self.steps += 1
        for label, term in stats.terms.items():
            # A term whose own gradient is zero is at its ceiling, or its schedule has not begun.
            if 0 < sizes[label] < largest / RATIO and abs(term["share"] or 0) < SMALL:
                self.ratios.setdefault(label, []).append(largest / sizes[label])
        ended = stats.step == trainer.config.training.steps and self.steps >= FEWEST
        without = {label: sum(found) / self.steps for label, found in self.ratios.items() if len(found) == self.steps}
        if without and (ended or self.steps == MOST):
            terms = ", ".join(
                f'"{label}" (its gradient is {ratio:,.0f} times smaller)' for label, ratio in without.items()
            )
            scaled = trainer.config.mix.combine in ("balanced", "pcgrad")
            balanced = "Set mix: {combine: balanced}, so that a weight means the same for every reward, or raise"
            warnings.warn(
                f"Terms with 0% of the gradient at each of the first {self.steps} steps, without influence: {terms}. "
                f"{'Raise' if scaled else balanced} its weight.",
                stacklevel=2,
            )
