"""Guards: which steps are dropped, which evaluation is the best, and when a run has gone far enough.

Pure bookkeeping on numbers, small enough to be kept in a checkpoint as JSON, so that a resumed run decides as the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median, pstdev
from typing import Any

from alignprop_core.config.sections import GuardsConfig
from alignprop_core.errors import AlignpropError, RewardError, RunError

_WINDOW, _ENOUGH = 32, 8
"""Steps whose gradient norms are remembered, and how many there must be before one can count as exploding."""


class StepGuard:
    """Says which steps must not reach the adapters: scores or gradients that are not finite, or that explode.

    A gradient explodes when its norm, before clipping, is above `guards.explosion` times the median of the last 32
    norms above zero; the first 8 steps are never judged so.
    """

    def __init__(self, config: GuardsConfig, advice: Mapping[str, str] | None = None) -> None:
        self.config = config
        self.advice = advice or {}  # label -> how its reward is tried on a picture (`terms.score_advice`)
        self.norms: list[float] = []
        self.terms: dict[str, list[float]] = {}
        self.dropped = 0
        self._error: AlignpropError | None = None

    def judge(
        self,
        step: int,
        raw: Mapping[str, float],
        grad_norm: float,
        *,
        overflow_expected: bool,
        terms: Mapping[str, float] | None = None,
    ) -> str | None:
        """Return why this step must be dropped, or None.

        Args:
            step: its number, from 1.
            raw: label -> mean raw score.
            grad_norm: norm of the adapters' gradient before clipping.
            overflow_expected: a gradient that is not finite is float16's loss scale finding its size; that is skipped
                and counted by nobody.
            terms: label -> norm of the term's gradient at the images; says whose gradient it is.
        """
        terms = terms or {}
        reason, self._error = self._reason(step, raw, grad_norm, overflow_expected, terms)
        if reason is not None:
            self.dropped += 1
        else:
            self.dropped = 0
            if math.isfinite(grad_norm) and grad_norm > 0:
                self.norms = [*self.norms, grad_norm][-_WINDOW:]
                for label, norm in terms.items():
                    if math.isfinite(norm) and norm > 0:
                        self.terms[label] = [*self.terms.get(label, ()), norm][-_WINDOW:]
        return reason

    def check(self, *, ended: bool = False) -> None:
        """Raise the last dropped step's error if `guards.max_dropped_steps` in a row were dropped.

        Args:
            ended: the run has no more steps: then it is also raised if no step of the run was any good.
        """
        if self._error is not None and (self.dropped >= self.config.max_dropped_steps or (ended and not self.norms)):
            raise self._error

    def _reason(
        self,
        step: int,
        raw: Mapping[str, float],
        grad_norm: float,
        overflow_expected: bool,
        terms: Mapping[str, float],
    ) -> tuple[str | None, AlignpropError | None]:
        row = f"This step and the {self.dropped} before it were" if self.dropped else "This step was"
        kept = f"{row} dropped: the adapters are as they were before, and the last checkpoint holds them."
        for label, value in raw.items():
            if not math.isfinite(value):
                check = f" Check the reward on a picture {advice}." if (advice := self.advice.get(label)) else ""
                return f'"{label}" gave a score that is not finite', RewardError(
                    f'Step {step}: reward "{label}" gave a score that is not finite ({value}). {kept}{check}'
                )
        if not math.isfinite(grad_norm):
            if overflow_expected:
                return None, None
            whose = " and ".join(f'"{label}"' for label, norm in terms.items() if not math.isfinite(norm))
            if whose:
                return f"the gradient is not finite: that of {whose}", RunError(
                    f"Step {step}: the gradient is not finite, though all scores are: that of {whose}, at the images "
                    f"already. {kept} A reward with an infinite slope (a square root or logarithm at zero) does this."
                )
            return "the gradient is not finite", RunError(
                f"Step {step}: the gradient is not finite, though all scores are"
                f"{', and so are the gradients of all rewards at the images' if terms else ''}. {kept} A lower "
                "optimizer.learning_rate, fewer kept steps or another training.mixed_precision may help."
            )
        factor = self.config.explosion
        if factor is not None and len(self.norms) >= _ENOUGH and grad_norm > factor * median(self.norms):
            usual = median(self.norms)
            times, whose = grad_norm / usual, self._grown(terms, grad_norm / usual)
            return f"its gradient norm {grad_norm:.3g} is {times:.3g} times the usual{whose}", RunError(
                f"Step {step}: the gradient norm is {grad_norm:.3g}, where {usual:.3g} is usual{whose}. {kept} Lower "
                "optimizer.learning_rate or keep fewer steps; if the mix really changes that much here, set "
                "guards.explosion higher, or null."
            )
        return None, None

    def _grown(self, terms: Mapping[str, float], times: float) -> str:
        """Name the terms whose own gradient grew at least a tenth as much as the whole; empty if none did."""
        grown = {
            label: norm / median(self.terms[label])
            for label, norm in terms.items()
            if len(self.terms.get(label, ())) >= _ENOUGH
        }
        # What lies between the images and the adapters has its part in the whole: hence not as much as the whole.
        told = [f'"{label}" {value:.3g} times' for label, value in grown.items() if value >= times / 10]
        return f" (at the images: {', '.join(told)})" if told else ""

    def as_json(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"norms": self.norms, "terms": self.terms, "dropped": self.dropped}

    def load(self, state: Mapping[str, Any]) -> None:
        """Put back what `as_json` gave."""
        self.norms, self.dropped = [float(norm) for norm in state["norms"]], int(state["dropped"])
        self.terms = {label: [float(norm) for norm in norms] for label, norms in state.get("terms", {}).items()}


@dataclass(frozen=True)
class Subject:
    """What evaluations measure. Evaluations are compared with each other only where that is the same.

    Each is key -> value, as JSON knows them; keys are those of the run config, or words.

    Attributes:
        pictures: what decides which pictures are drawn: nothing measured on others can be compared.
        diversity: what diversity is measured with.
        watched: what is watched, and which way is better.
    """

    pictures: Mapping[str, Any] = field(default_factory=dict)
    diversity: Mapping[str, Any] = field(default_factory=dict)
    watched: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Standing:
    """How an evaluated run stands.

    Attributes:
        best: the best watched score so far, and the step it was seen at; None before there is one.
        best_drift: drift there.
        best_diversity: diversity there.
        since: evaluations since then.
        step: the last evaluation's step; None before there is one.
        first_diversity: diversity at the first that measured it.
        spreads: label -> standard deviation of its scores at the first.
        drift: drift at the last.
        diversity: diversity at the last.
        subject: what all of this was measured on; None before the first evaluation.
    """

    best: float | None = None
    best_step: int | None = None
    best_drift: float | None = None
    best_diversity: float | None = None
    since: int = 0
    step: int | None = None
    first_diversity: float | None = None
    spreads: dict[str, float] = field(default_factory=dict)
    drift: float | None = None
    diversity: float | None = None
    subject: Subject | None = None


class HeldOutGuard:
    """Goes by the evaluations while training: keeps count of the best and says when to stop."""

    def __init__(self, config: GuardsConfig) -> None:
        self.config = config
        self.standing = Standing()

    def measures(self, subject: Subject) -> str | None:
        """Take in what evaluations measure from here on; returns why the best so far no longer counts, or None.

        What still can be compared is kept: with another watched score, what limits go by; with a limit that the best
        is outside of, everything but the best.
        """
        now, before = self.standing, self.standing.subject
        now.subject = subject
        if now.step is None:
            return None
        if before is None:
            self.standing = Standing(subject=subject)
            return "the checkpoint does not say what was measured"
        drawn, watched = _changed(before.pictures, subject.pictures), _changed(before.watched, subject.watched)
        encoded = _changed(before.diversity, subject.diversity)
        if drawn:
            now = self.standing = Standing(subject=subject)
        elif encoded:
            now.first_diversity = now.diversity = now.best_diversity = None
        floor = self.config.diversity_floor is not None
        why = [changed for changed in (drawn, encoded if floor else "", watched) if changed]
        if not why and now.best is not None and (outside := self._beyond_limits(now.best_drift, now.best_diversity)):
            why = [f"at the best, of step {now.best_step}, {outside}"]
        if why:
            now.best = now.best_step = now.best_drift = now.best_diversity = now.step = None
            now.since = 0
        return " and ".join(why) or None

    def judge(self, step: int, score: float, drift: float, diversity: float | None) -> bool:
        """Take in an evaluation; returns whether it is the best so far (and within the limits)."""
        now, limits = self.standing, self.config
        if now.first_diversity is None:
            now.first_diversity = diversity
        now.step = step
        now.drift, now.diversity = drift, diversity
        better = now.best is None or (score < now.best if limits.lower_is_better else score > now.best)
        if math.isfinite(score) and better and self._beyond_limits(drift, diversity) is None:
            now.best, now.best_step, now.since = score, step, 0
            now.best_drift, now.best_diversity = drift, diversity
            return True
        now.since += 1
        return False

    def stop_reason(self) -> str | None:
        """Return why the run should stop as it stands, or None."""
        now, patience = self.standing, self.config.patience
        if reason := self._beyond_limits(now.drift, now.diversity):
            return reason
        if patience is not None and now.since >= patience:
            best = "" if now.best is None else f" (best {now.best:.5g} at step {now.best_step})"
            times = "the last evaluation" if patience == 1 else f"{patience} evaluations in a row"
            return f"held-out {self.config.watch} was no better at {times}{best}"
        return None

    def _beyond_limits(self, drift: float | None, diversity: float | None) -> str | None:
        limit, share, first = self.config.drift_limit, self.config.diversity_floor, self.standing.first_diversity
        if limit is not None and drift is not None and not drift <= limit:
            return f"drift {drift:.3g} is above guards.drift_limit {limit:g}"
        if share is not None and first and diversity is not None and not diversity >= share * first:
            return f"diversity {diversity:.3g} is below guards.diversity_floor {share:g} of its first, {first:.3g}"
        return None

    def as_json(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return asdict(self.standing)

    def load(self, state: Mapping[str, Any]) -> None:
        """Put back what `as_json` gave."""
        subject = state.get("subject")
        self.standing = Standing(**{**state, "subject": None if subject is None else Subject(**subject)})


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say which values differ; empty if none does. A key that only one has goes with another that differs."""
    told = []
    for key in now:
        if key in before and before[key] != now[key]:
            old, new = (json.dumps(value, ensure_ascii=False) for value in (before[key], now[key]))
            told.append(key if isinstance(now[key], Mapping) else f"{key} (was {old}, is {new})")
    return f"{' and '.join(told)} changed" if told else ""


def spread(scores: Sequence[float]) -> float:
    """Return the standard deviation of scores, or 1 where they do not differ."""
    return pstdev(scores) or 1.0
