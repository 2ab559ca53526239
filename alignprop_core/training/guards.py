"""Guards: which steps are dropped, which evaluation is the best, and when a run has gone far enough.

Pure bookkeeping on numbers, small enough to be kept in a checkpoint as JSON, so that a resumed run decides as the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median, pstdev
from typing import Any

from alignprop_core.config import GuardsConfig
from alignprop_core.errors import AlignpropError, RewardError, RunError

_WINDOW, _ENOUGH = 32, 8
"""Steps whose gradient norms are remembered, and how many there must be before one can count as exploding."""


class StepGuard:
    """Says which steps must not reach the adapters: scores or gradients that are not finite, or that explode.

    A gradient explodes when its norm, before clipping, is above `guards.explosion` times the median of the last 32
    norms above zero; the first 8 steps are never judged so.
    """

    def __init__(self, config: GuardsConfig) -> None:
        self.config = config
        self.norms: list[float] = []
        self.dropped = 0
        self._error: AlignpropError | None = None

    def judge(self, step: int, raw: Mapping[str, float], grad_norm: float, *, overflow_expected: bool) -> str | None:
        """Return why this step must be dropped, or None.

        Args:
            step: its number, from 1.
            raw: label -> mean raw score.
            grad_norm: norm of the adapters' gradient before clipping.
            overflow_expected: a gradient that is not finite is float16's loss scale finding its size; that is skipped
                and counted by nobody.
        """
        reason, self._error = self._reason(step, raw, grad_norm, overflow_expected)
        if reason is not None:
            self.dropped += 1
        else:
            self.dropped = 0
            if math.isfinite(grad_norm) and grad_norm > 0:
                self.norms = [*self.norms, grad_norm][-_WINDOW:]
        return reason

    def check(self) -> None:
        """Raise the last dropped step's error if `guards.max_dropped_steps` in a row were dropped."""
        if self._error is not None and self.dropped >= self.config.max_dropped_steps:
            raise self._error

    def _reason(
        self, step: int, raw: Mapping[str, float], grad_norm: float, overflow_expected: bool
    ) -> tuple[str | None, AlignpropError | None]:
        limit = self.config.max_dropped_steps
        row = "This step was" if limit == 1 else f"This step and the {limit - 1} before it were"
        kept = f"{row} dropped: the adapters are as they were before, and the last checkpoint holds them."
        for label, value in raw.items():
            if not math.isfinite(value):
                return f'"{label}" gave a score that is not finite', RewardError(
                    f'Step {step}: reward "{label}" gave a score that is not finite ({value}). {kept} Check the reward '
                    f"on a picture with `alignprop score IMAGE --reward {label}`."
                )
        if not math.isfinite(grad_norm):
            if overflow_expected:
                return None, None
            return "the gradient is not finite", RunError(
                f"Step {step}: the gradient is not finite, though all scores are. {kept} A reward with an infinite "
                "slope (a square root or logarithm at zero) does this; a lower optimizer.learning_rate or fewer kept "
                "steps may help."
            )
        factor = self.config.explosion
        if factor is not None and len(self.norms) >= _ENOUGH and grad_norm > factor * median(self.norms):
            usual = median(self.norms)
            return f"its gradient norm {grad_norm:.3g} is {grad_norm / usual:.3g} times the usual", RunError(
                f"Step {step}: the gradient norm is {grad_norm:.3g}, where {usual:.3g} is usual. {kept} Lower "
                "optimizer.learning_rate or keep fewer steps; if the mix really changes that much here, set "
                "guards.explosion higher, or null."
            )
        return None, None

    def as_json(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"norms": self.norms, "dropped": self.dropped}

    def load(self, state: Mapping[str, Any]) -> None:
        """Put back what `as_json` gave."""
        self.norms, self.dropped = [float(norm) for norm in state["norms"]], int(state["dropped"])


@dataclass
class Standing:
    """How an evaluated run stands; numbers alone.

    Attributes:
        best: the best watched score so far, and the step it was seen at; None before there is one.
        since: evaluations since then.
        step: the last evaluation's step; None before there is one.
        first_diversity: diversity at the first.
        spreads: label -> standard deviation of its scores at the first.
        drift: drift at the last.
        diversity: diversity at the last.
    """

    best: float | None = None
    best_step: int | None = None
    since: int = 0
    step: int | None = None
    first_diversity: float | None = None
    spreads: dict[str, float] = field(default_factory=dict)
    drift: float | None = None
    diversity: float | None = None


class HeldOutGuard:
    """Goes by the evaluations while training: keeps count of the best and says when to stop."""

    def __init__(self, config: GuardsConfig) -> None:
        self.config = config
        self.standing = Standing()

    def judge(self, step: int, score: float, drift: float, diversity: float | None) -> bool:
        """Take in an evaluation; returns whether it is the best so far (and within the limits)."""
        now, limits = self.standing, self.config
        if now.step is None:
            now.first_diversity = diversity
        now.step = step
        now.drift, now.diversity = drift, diversity
        better = now.best is None or (score < now.best if limits.lower_is_better else score > now.best)
        if math.isfinite(score) and better and self._beyond_limits() is None:
            now.best, now.best_step, now.since = score, step, 0
            return True
        now.since += 1
        return False

    def stop_reason(self) -> str | None:
        """Return why the run should stop as it stands, or None."""
        if reason := self._beyond_limits():
            return reason
        now, patience = self.standing, self.config.patience
        if patience is not None and now.since >= patience:
            best = "" if now.best is None else f" (best {now.best:.5g} at step {now.best_step})"
            times = "the last evaluation" if patience == 1 else f"{patience} evaluations in a row"
            return f"held-out {self.config.watch} was no better at {times}{best}"
        return None

    def _beyond_limits(self) -> str | None:
        now, limits = self.standing, self.config
        if limits.drift_limit is not None and now.drift is not None and not now.drift <= limits.drift_limit:
            return f"drift {now.drift:.3g} is above guards.drift_limit {limits.drift_limit:g}"
        first, share = now.first_diversity, limits.diversity_floor
        if share is not None and first and now.diversity is not None and not now.diversity >= share * first:
            return f"diversity {now.diversity:.3g} is below guards.diversity_floor {share:g} of its first, {first:.3g}"
        return None

    def as_json(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return asdict(self.standing)

    def load(self, state: Mapping[str, Any]) -> None:
        """Put back what `as_json` gave."""
        self.standing = Standing(**state)


def spread(scores: Sequence[float]) -> float:
    """Return the standard deviation of scores, or 1 where they do not differ."""
    return pstdev(scores) or 1.0
