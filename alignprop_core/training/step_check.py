"""Which optimizer steps are skipped: those with scores or gradients that are not finite, or with a gradient spike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from alignprop_core.config.sections import OptimizerConfig
from alignprop_core.diffusion.finite import ADVICE, NotFinite
from alignprop_core.errors import AlignpropError, RewardError, RunError
from alignprop_core.mix.stats import StepStats

_WINDOW, _ENOUGH = 32, 8
"""Number of gradient norms remembered, and how many there must be before one can count as a spike."""


class StepCheck:
    """Decides which steps must not reach the adapters.

    A gradient is a spike when its norm, before clipping, exceeds `optimizer.spike_threshold` times the median of the
    last 32 norms above zero; the first 8 steps are never spikes.

    Args:
        config: the `optimizer` section of the run config.
        advice: label -> how its reward is tried on an image (`score_advice`), for messages.
    """

    def __init__(self, config: OptimizerConfig, advice: Mapping[str, str] | None = None) -> None:
        self.config = config
        self.advice = advice or {}
        self.norms: list[float] = []
        self.terms: dict[str, list[float]] = {}
        self.skipped = 0
        self._error: AlignpropError | None = None
        self._found: NotFinite | None = None

    def reason_to_skip(
        self, step: int, stats: StepStats, locate: Callable[[], NotFinite | None] = lambda: None
    ) -> str | None:
        """Return why this step must be skipped, or None.

        Args:
            step: its number, from 1.
            stats: its statistics, on the host.
            locate: finds the first value of the step that is not finite; called for the first such step in a row.
        """
        terms = {label: norm for label, term in stats.terms.items() if (norm := term["grad_norm"]) is not None}
        norm, threshold = stats.grad_norm, self.config.spike_threshold
        finite = math.isfinite(norm)
        broken = any(term["raw"] is None or not math.isfinite(term["raw"]) for term in stats.terms.values())
        spike = threshold is not None and len(self.norms) >= _ENOUGH and norm > threshold * median(self.norms)
        if broken or (spike and finite) or not finite:
            if not self.skipped and (broken or not finite):
                self._found = locate()
            reason, self._error = self._explain(step, stats, terms)
            self.skipped += 1
            return reason
        self.skipped, self._error, self._found = 0, None, None
        if finite and norm > 0:
            self.norms = [*self.norms, norm][-_WINDOW:]
            for label, size in terms.items():
                if math.isfinite(size) and size > 0:
                    self.terms[label] = [*self.terms.get(label, ()), size][-_WINDOW:]
        return None

    def raise_if_failing(self, *, ended: bool = False) -> None:
        """Raise the last skipped step's error if `optimizer.max_skipped_steps` in a row were skipped.

        Args:
            ended: the run has no more steps: then also if no step of the run was usable.
        """
        failing = self.skipped >= self.config.max_skipped_steps or (ended and not self.norms)
        if self._error is not None and failing:
            raise self._error

    def _explain(self, step: int, stats: StepStats, terms: Mapping[str, float]) -> tuple[str, AlignpropError]:
        """Return why a step is skipped, and the error if it ends the run."""
        row = f"This step and the {self.skipped} before it were" if self.skipped else "This step was"
        kept = f"{row} skipped: the adapters did not change, and the last checkpoint has them."
        found = self._found
        where = f" The first value that is not finite is {found}." if found else ""
        broken = any(term["raw"] is None or not math.isfinite(term["raw"]) for term in stats.terms.values())
        if broken and found is not None and found.by_model:
            return "the model's images are not finite", RunError(
                f"Step {step}: the model's images are not finite.{where} {kept} {ADVICE}"
            )
        for label, term in stats.terms.items():
            value = term["raw"]
            if value is None or not math.isfinite(value):
                check = f" Check the reward on an image {advice}." if (advice := self.advice.get(label)) else ""
                return f'"{label}" returned a score that is not finite', RewardError(
                    f'Step {step}: reward "{label}" returned a score that is not finite ({value}).{where} {kept}{check}'
                )
        norm = stats.grad_norm
        if not math.isfinite(norm):
            whose = " and ".join(f'"{label}"' for label, value in terms.items() if not math.isfinite(value))
            if whose:
                return f"the gradient of {whose} is not finite", RunError(
                    f"Step {step}: all scores are finite, but the gradient of {whose} at the images is not.{where} "
                    f"{kept} A reward with an infinite slope (a square root or logarithm at zero) causes this."
                )
            finite = ", and so are the gradients of all rewards at the images" if terms else ""
            return "the gradient is not finite", RunError(
                f"Step {step}: the gradient is not finite, although all scores are{finite}.{where} {kept} A lower "
                "optimizer.learning_rate, fewer kept steps or another training.mixed_precision may help."
            )
        usual = median(self.norms)
        whose = self._grown(terms, norm / usual)
        return f"its gradient norm {norm:.3g} is {norm / usual:.3g} times the median{whose}", RunError(
            f"Step {step}: the gradient norm is {norm:.3g}, and the median of recent steps is {usual:.3g}{whose}. "
            f"{kept} Lower optimizer.learning_rate or keep fewer steps; if the mix really changes that much here, "
            "raise optimizer.spike_threshold, or set it to null."
        )

    def _grown(self, terms: Mapping[str, float], times: float) -> str:
        """Name the terms whose own gradient grew at least a tenth as much as the whole; empty if none did."""
        grown = {
            label: norm / median(self.terms[label])
            for label, norm in terms.items()
            if len(self.terms.get(label, ())) >= _ENOUGH
        }
        # The network between images and adapters contributes too: hence not as much as the whole.
        named = [f'"{label}" {value:.3g} times' for label, value in grown.items() if value >= times / 10]
        return f" (at the images: {', '.join(named)})" if named else ""

    def as_json(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"norms": self.norms, "terms": self.terms, "skipped": self.skipped}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `as_json` returned."""
        self.norms, self.skipped = [float(norm) for norm in state["norms"]], int(state["skipped"])
        self.terms = {label: [float(norm) for norm in norms] for label, norms in state.get("terms", {}).items()}
