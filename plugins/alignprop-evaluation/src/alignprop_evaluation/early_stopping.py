"""Early stopping: which evaluation is the best so far, and when a run should stop.

Pure bookkeeping on numbers that fit into a checkpoint as JSON, so that a resumed run decides as the run itself would.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from alignprop_core.config.sections import EarlyStoppingConfig


@dataclass(frozen=True)
class Basis:
    """What evaluations measure. Evaluations are compared with each other only where that is the same.

    Each attribute maps keys, those of the run config or descriptions, to JSON values.

    Attributes:
        images: what decides which images are generated: nothing measured on other images can be compared.
        diversity: what diversity is measured with.
        monitored: what is monitored, and which way is better.
    """

    images: Mapping[str, Any] = field(default_factory=dict)
    diversity: Mapping[str, Any] = field(default_factory=dict)
    monitored: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class State:
    """What is known from the evaluations so far.

    Attributes:
        best: the best monitored score, and the step of its evaluation; None before there is one.
        best_drift: drift there.
        best_diversity: diversity there.
        since: number of evaluations since then.
        step: step of the last evaluation; None before there is one.
        first_diversity: diversity at the first evaluation that measured it.
        stds: label -> standard deviation of its scores at the first evaluation.
        drift: drift at the last evaluation.
        diversity: diversity at the last evaluation.
        basis: what all of this was measured on; None before the first evaluation.
    """

    best: float | None = None
    best_step: int | None = None
    best_drift: float | None = None
    best_diversity: float | None = None
    since: int = 0
    step: int | None = None
    first_diversity: float | None = None
    stds: dict[str, float] = field(default_factory=dict)
    drift: float | None = None
    diversity: float | None = None
    basis: Basis | None = None


class EarlyStopping:
    """Keeps track of the best evaluation and decides when to stop.

    Args:
        config: the `early_stopping` section of the run config.
    """

    def __init__(self, config: EarlyStoppingConfig) -> None:
        self.config = config
        self.state = State()

    def rebase(self, basis: Basis) -> str | None:
        """Set what evaluations measure from here on; returns why the best so far no longer counts, or None.

        What can still be compared is kept: with another monitored score, what the limits need; with a limit that the
        best violates, everything but the best.
        """
        now, before = self.state, self.state.basis
        now.basis = basis
        if now.step is None:
            return None
        if before is None:
            self.state = State(basis=basis)
            return "the checkpoint does not record what was measured"
        images, monitored = _changed(before.images, basis.images), _changed(before.monitored, basis.monitored)
        encoder = _changed(before.diversity, basis.diversity)
        if images:
            now = self.state = State(basis=basis)
        elif encoder:
            now.first_diversity = now.diversity = now.best_diversity = None
        limited = self.config.min_diversity is not None
        why = [changed for changed in (images, encoder if limited else "", monitored) if changed]
        if not why and now.best is not None and (outside := self._violation(now.best_drift, now.best_diversity)):
            why = [f"at the best evaluation, of step {now.best_step}, {outside}"]
        if why:
            now.best = now.best_step = now.best_drift = now.best_diversity = now.step = None
            now.since = 0
        return " and ".join(why) or None

    def update(self, step: int, score: float, drift: float, diversity: float | None) -> bool:
        """Add an evaluation; returns whether it is the best so far (and within the limits)."""
        now = self.state
        if now.first_diversity is None:
            now.first_diversity = diversity
        now.step = step
        now.drift, now.diversity = drift, diversity
        better = now.best is None or (score < now.best if self.config.mode == "min" else score > now.best)
        if math.isfinite(score) and better and self._violation(drift, diversity) is None:
            now.best, now.best_step, now.since = score, step, 0
            now.best_drift, now.best_diversity = drift, diversity
            return True
        now.since += 1
        return False

    def stop_reason(self) -> str | None:
        """Return why the run should stop now, or None."""
        now, patience = self.state, self.config.patience
        if reason := self._violation(now.drift, now.diversity):
            return reason
        if patience is not None and now.since >= patience:
            best = "" if now.best is None else f" (best {now.best:.5g} at step {now.best_step})"
            times = "the last evaluation" if patience == 1 else f"{patience} evaluations in a row"
            return f"held-out {self.config.monitor} did not improve at {times}{best}"
        return None

    def _violation(self, drift: float | None, diversity: float | None) -> str | None:
        limit, share, first = self.config.max_drift, self.config.min_diversity, self.state.first_diversity
        if limit is not None and drift is not None and not drift <= limit:
            return f"drift {drift:.3g} is above early_stopping.max_drift {limit:g}"
        if share is not None and first and diversity is not None and not diversity >= share * first:
            return (
                f"diversity {diversity:.3g} is below early_stopping.min_diversity {share:g} of its first, {first:.3g}"
            )
        return None

    def as_json(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return asdict(self.state)

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `as_json` returned."""
        basis = state.get("basis")
        self.state = State(**{**state, "basis": None if basis is None else Basis(**basis)})


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return which values differ; empty if none does. A key that only one has goes with another that differs."""
    named = []
    for key in now:
        if key in before and before[key] != now[key]:
            old, new = (json.dumps(value, ensure_ascii=False) for value in (before[key], now[key]))
            named.append(key if isinstance(now[key], Mapping) else f"{key} (was {old}, is {new})")
    return f"{' and '.join(named)} changed" if named else ""
