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
        if self.steps < MOST and max(sizes.values()) > 0:
            self.steps += 1
            for label, term in stats.terms.items():
                # A term whose own gradient is zero is at its ceiling, or its schedule has not begun.
                ratio = max(sizes.values()) / sizes[label] if sizes[label] > 0 else 0
                if ratio > RATIO and abs(term["share"] or 0) < SMALL:
                    self.ratios.setdefault(label, []).append(ratio)
            if self.steps == MOST:
                self.warn(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Warn after a shorter run."""
        if FEWEST <= self.steps < MOST:
            self.warn(trainer)

    def warn(self, trainer: Trainer) -> None:
        """Show the warning, if a term had 0% at every step."""
        without = {
            label: sum(ratios) / len(ratios) for label, ratios in self.ratios.items() if len(ratios) == self.steps
        }
        if not without:
            return
        terms = ", ".join(f'"{label}" (its gradient is {ratio:,.0f} times smaller)' for label, ratio in without.items())
        combine = trainer.config.mix.combine
        remedy = "Set mix: {combine: balanced}, so that a weight means the same for every reward, or raise its weight."
        remedy = remedy if combine in ("sum", "normalized") else "Raise its weight."
        warnings.warn(
            f"Terms with 0% of the gradient at each of the first {self.steps} steps, which changes nothing: {terms}. "
            f"{remedy}",
            stacklevel=2,
        )
