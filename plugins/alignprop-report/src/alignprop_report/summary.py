"""The result and the progress of a run in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any

from alignprop_core.evaluation.table import sample_size
from alignprop_report.axes import figure
from alignprop_report.run_files import Run, label_of, mapping, mappings, number, pick

_TOLD = 4
"""Maximum number of measures in the sentence at the top."""


@dataclass(frozen=True)
class Change:
    """A score before and after.

    Attributes:
        label: its name.
        base: mean of the base model.
        tuned: mean of the tuned model.
        difference: mean of the paired differences.
        interval: its 95% interval; None where there are no pairs to take one from.
        n: images.
    """

    label: str
    base: float
    tuned: float
    difference: float
    interval: tuple[float, float] | None
    n: int | None

    @property
    def percent(self) -> str:
        """The difference in percent of the base; empty where that is meaningless, such as for negative scores."""
        if self.base <= 0 or self.tuned < 0:
            return ""
        if self.difference == 0:
            return "0%"
        share = 100 * self.difference / self.base
        return f"{share:+.0f}%" if abs(share) >= 10 else f"{share:+.1f}%"

    @property
    def by_chance(self) -> bool:
        """Whether the interval includes no change."""
        return self.interval is not None and self.interval[0] <= 0 <= self.interval[1]

    def clause(self, *, again: bool = False) -> str:
        """Return a clause: jpeg_bytes fell by 27% (6,231 to 4,548, 95% interval of the difference -1,800 to -1,560).

        With `again`, the interval is named briefly, because an earlier clause named it in full.
        """
        if self.difference == 0:
            return f"{self.label} stayed at {figure(self.base)}"
        between = f"{figure(self.base)} to {figure(self.tuned)}"
        if self.interval is not None:
            name = "difference" if again else "95% interval of the difference"
            between += f", {name} {signed(self.interval[0])} to {signed(self.interval[1])}"
        verb = "rose" if self.difference > 0 else "fell"
        share = self.percent.lstrip("+-")
        chance = ", which may be chance" if self.by_chance else ""
        return f"{self.label} {verb}{f' by {share}' if share else ''} ({between}){chance}"


def changes(comparison: Mapping[str, Any] | None) -> list[Change]:
    """Return every score of evaluation.json."""
    found = []
    for label, base in mapping(pick(comparison, "base")).items():
        change = _change(label, base, pick(comparison, "tuned", label))
        if change is not None:
            found.append(change)
    return found


def spread_change(comparison: Mapping[str, Any] | None) -> Change | None:
    """Return the diversity of evaluation.json, where it was measured."""
    return _change("diversity", pick(comparison, "diversity", "base"), pick(comparison, "diversity", "tuned"))


def drift_of(comparison: Mapping[str, Any] | None) -> float | None:
    """Return the tuned model's drift from the base model."""
    return number(pick(comparison, "drift", "tuned"))


def sample(results: Mapping[str, Any] | None) -> str:
    """Return how many prompts and images an evaluation or a sweep has, and a warning if the prompts are few."""
    known = {key: pick(results, key) for key in ("images", "images_per_prompt", "prompt_count")}
    whole = {key: int(value) for key, found in known.items() if (value := number(found)) is not None and value >= 1}
    how = "; the 95% intervals are clustered by prompt" if "prompt_count" in whole else ""
    return sample_size(whole, how) if "images" in whole else ""


def role(run: Run, label: str) -> str:
    """Return the role of a measure in a run: trained on, a true measure of that, or only reported."""
    if label in run.labels:
        return "trained on"
    further = [label_of(term) for term in mappings(pick(run.config, "evaluation", "rewards"))]
    return "reported" if label in further else "true measure"


def result(run: Run) -> str:
    """Return one sentence on what training changed, from the best evidence available."""
    found = changes(run.comparison)
    if found:
        # A true measure is better evidence than the reward that approximates it.
        order = ("true measure", "trained on", "reported")
        found.sort(key=lambda change: order.index(role(run, change.label)))
        shown = [change for change in found if role(run, change.label) != "reported"][:_TOLD] or found[:_TOLD]
        text = [change.clause(again=i > 0) + _against(run, change) for i, change in enumerate(shown)]
        return f"{_occasion(run.comparison)}{'; '.join(text)}."
    if len(run.evaluations) > 1:
        first, last = run.evaluations[0], run.evaluations[-1]
        labels = [label for label in mapping(last.get("scores")) if label in run.labels] or ["total"]
        parts = [_from_to(label, _score(first, label), _score(last, label)) for label in labels[:_TOLD]]
        steps = f"between step {first['step']} and step {last['step']}"
        return f"On held-out prompts {'; '.join(filter(None, parts))}, {steps} (evaluated while training)."
    rewards = [value for row in run.steps if (value := number(row.get("total"))) is not None]
    if len(rewards) > 1:
        part = max(1, len(rewards) // 10)
        sides = fsum(rewards[:part]) / part, fsum(rewards[-part:]) / part
        change = _from_to("the total in training", *sides)
        of = "first and last step" if part == 1 else f"means of the first and last {part} steps"
        return f"There was no evaluation on held-out prompts; {change} ({of})."
    return "There are no metrics yet."


def standing(run: Run) -> str:
    """Return the progress of the run, and which step's LoRA it saved."""
    of = "" if run.planned is None else f" of {run.planned}"
    if run.stop_reason is not None:
        text = f"Stopped early at step {run.last_step}{of}: {run.stop_reason}."
    elif run.finished:
        text = f"Finished after {run.last_step} steps."
    elif run.has_lora and run.steps:
        text = f"The metrics end at step {run.last_step}{of}, but the final LoRA exists."
    elif run.steps:
        text = f"Not finished: step {run.last_step}{of}."
    else:
        text = "No step has finished yet."
    kept = number(pick(run.comparison, "step"))
    if kept is not None and kept != run.last_step:
        text += f" {'The LoRA' if run.finished else 'evaluation.json'} is from step {kept:.0f}."
    elif run.best_step is not None and run.best_step < run.last_step and (run.path / "lora" / "best").is_dir():
        text += f" The best evaluation was at step {run.best_step:.0f}; the LoRA of that step is in lora/best."
    return text


def minutes(seconds: float) -> str:
    """Return a readable duration: 41 s, 8 min, 2 h 5 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    whole = round(seconds / 60)
    return f"{whole} min" if whole < 100 else f"{whole // 60} h {whole % 60} min"


def signed(value: float) -> str:
    """Return a number with its sign."""
    return ("+" if value > 0 else "") + figure(value)


def _change(label: str, base: object, tuned: object) -> Change | None:
    before, after = number(pick(base, "mean")), number(pick(tuned, "mean"))
    if before is None or after is None:
        return None
    difference = number(pick(tuned, "difference"))
    ends = pick(tuned, "interval")
    known = [number(end) for end in ends] if isinstance(ends, list) and len(ends) == 2 else []
    interval = (known[0], known[1]) if known and known[0] is not None and known[1] is not None else None
    n = number(pick(tuned, "n"))
    change = after - before if difference is None else difference
    return Change(str(label), before, after, change, interval, None if n is None else int(n))


def _occasion(comparison: Mapping[str, Any] | None) -> str:
    images, per = number(pick(comparison, "images")), number(pick(comparison, "images_per_prompt"))
    if not images:
        return "On held-out prompts "
    prompts = f" of {images / per:.0f} held-out prompts" if per else ""
    return f"On {images:.0f} images{prompts}, with the same seeds before and after, "


def _against(run: Run, change: Change) -> str:
    """Return a remark where a score moved against the sign of its weight."""
    term = next((term for term in run.rewards if label_of(term) == change.label), None)
    if term is None or term.get("target") is not None or change.by_chance:
        return ""
    weight = term.get("weight", 1.0)
    last: Sequence[object] = list(weight.values())[-1:] if isinstance(weight, Mapping) else [weight]
    wanted = number(last[0]) if last else None
    wrong = wanted is not None and wanted * change.difference < 0
    return ", opposite to what was trained for" if wrong else ""


def _score(row: Mapping[str, Any], label: str) -> float | None:
    return number(row.get("total") if label == "total" else pick(row, "scores", label, "mean"))


def _from_to(label: str, before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return ""
    return Change(label, before, after, after - before, None, None).clause()
