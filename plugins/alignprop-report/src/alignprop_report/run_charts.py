"""The charts of a run: scores, the mix, gradients, drift and diversity."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from alignprop_report.chart import Chart, Line, Mark
from alignprop_report.run_files import Run, mapping, mappings, number, pick

TRAINING, HELD_OUT = "training", "held out"
REGULARIZED, LEARNING_RATE, GRADIENT = "regularization", "learning rate", "gradient norm of the adapters"


def of_steps(run: Run, *keys: str) -> tuple[list[float], list[float | None]]:
    """Return the steps, and the value at nested keys in each one's line."""
    return [float(row["step"]) for row in run.steps], [number(pick(row, *keys)) for row in run.steps]


def of_evaluations(run: Run, *keys: str) -> tuple[list[float], list[float | None]]:
    """Return the steps that were evaluated while training, and the value at nested keys in each evaluation."""
    rows = run.evaluations
    return [float(row["step"]) for row in rows], [number(pick(row, *keys)) for row in rows]


def marks(run: Run) -> list[Mark]:
    """Return events: steps that were skipped or idle, and the step whose LoRA was saved."""
    found = [Mark(row["step"], "skipped", str(row["skipped"])) for row in run.steps if row.get("skipped")]
    found += [Mark(row["step"], "idle", str(row["idle"])) for row in run.steps if row.get("idle")]
    kept = number(pick(run.comparison, "step"))
    if kept is not None and kept < run.last_step and run.finished:
        found.append(Mark(kept, "saved", "step of the saved LoRA"))
    return found


def trained_labels(run: Run) -> list[str]:
    """Return the labels of the terms in metrics.jsonl, those of the config first."""
    seen = dict.fromkeys(label for row in run.steps for label in mapping(row.get("terms")))
    return [label for label in run.labels if label in seen] + [label for label in seen if label not in run.labels]


def evaluated_labels(run: Run) -> list[str]:
    """Return the labels of all scores in evaluations while training."""
    return list(dict.fromkeys(label for row in run.evaluations for label in mapping(row.get("scores"))))


def score_charts(run: Run) -> list[Chart]:
    """Return the total, then each score: over the steps, and on held-out prompts where both have the same unit."""
    labels, events = trained_labels(run), marks(run)
    charts = []
    total, alone = of_steps(run, "total"), len(labels) == 1
    same = alone and _alike(total[1], of_steps(run, "terms", labels[0], "raw")[1])
    if not same:
        lines = [Line(TRAINING, *total, color=7)]
        note = "the mix's total, limits and weights included"
        if pick(run.config, "mix", "combine") in (None, "sum"):
            lines.append(_held_out(run, "total"))
        else:  # the held-out total has a scale of its own
            note += ", in a unit that changes during the run"
        charts.append(Chart("total", lines, note=note, marks=events))
    for place, label in enumerate(labels):
        lines = [Line(TRAINING, *of_steps(run, "terms", label, "raw"), color=place)]
        lines.append(_held_out(run, "scores", label, "mean"))
        note = "what is trained on" if same else ""
        charts.append(Chart(label, lines, note=note, limits=_limits(run, label), marks=events))
    return charts


def held_out_charts(run: Run) -> list[Chart]:
    """Return what is measured on held-out prompts alone: further scores, total, drift and diversity."""
    charts = []
    for label in evaluated_labels(run):
        if label not in trained_labels(run):
            charts.append(Chart(label, [_held_out(run, "scores", label, "mean")], note="measured, not trained on"))
    if pick(run.config, "mix", "combine") not in (None, "sum") and len(trained_labels(run)) > 1:
        note = "the mix's total in standard deviations of the first evaluation"
        charts.append(Chart("held-out total", [_held_out(run, "total")], note=note))
    limit = number(pick(run.config, "early_stopping", "max_drift"))
    charts.append(
        Chart(
            "drift from the base model",
            [_held_out(run, "drift")],
            note="relative change of the predicted noise",
            within=[0.0],
            limits=[] if limit is None else [(limit, "early_stopping.max_drift")],
        )
    )
    share, known = number(pick(run.config, "early_stopping", "min_diversity")), of_evaluations(run, "diversity")[1]
    floor = share * known[0] if share is not None and known and known[0] is not None else None
    charts.append(
        Chart(
            "diversity",
            [_held_out(run, "diversity")],
            note="mean distance between images of one prompt",
            within=[0.0],
            limits=[] if floor is None else [(floor, "early_stopping.min_diversity")],
        )
    )
    return charts


def mix_charts(run: Run) -> list[Chart]:
    """Return what the mix did: parts of the direction, conflicts, contributions, gradients, saturated images."""
    labels, events = trained_labels(run), marks(run)

    def each(key: str) -> list[Line]:
        return [
            Line(label, *of_steps(run, "terms", label, key), color=place, style="steps" if len(labels) < 3 else "trend")
            for place, label in enumerate(labels)
        ]

    charts = []
    if len(labels) > 1:
        pairs = dict.fromkeys(pair for row in run.steps for pair in mapping(row.get("cosines")))
        cosines = [
            Line(pair, *of_steps(run, "cosines", pair), color=place, style="steps" if len(pairs) < 3 else "trend")
            for place, pair in enumerate(pairs)
        ]
        charts = [
            Chart("share of the direction", each("share"), "parts add up to 1", within=[0.0, 1.0], marks=events),
            Chart("cosine of two gradients", cosines, "below 0, two terms conflict", within=[-1.0, 1.0], marks=events),
            Chart("weighted", each("weighted"), "contribution of each term to the total", marks=events),
            Chart("gradient norm at the image", each("grad_norm"), "of each term, before weights", True, marks=events),
        ]
    if _any(run, lambda row: any(number(pick(term, "saturated")) for term in mapping(row.get("terms")).values())):
        note = "share of images at a ceiling, floor or target"
        charts.append(Chart("saturated images", each("saturated"), note, within=[0.0, 1.0], marks=events))
    return charts


def step_charts(run: Run) -> list[Chart]:
    """Return the gradient's norm, and the learning rate and the regularization where it is used."""
    charts = [
        Chart(GRADIENT, [Line("norm", *of_steps(run, "grad_norm"), color=7)], "before clipping", True, marks=marks(run))
    ]
    rates = of_steps(run, "learning_rate")
    if len({rate for rate in rates[1] if rate is not None}) > 1:
        charts.append(Chart(LEARNING_RATE, [Line("rate", *rates, color=7, style="trend")], within=[0.0]))
    if _any(run, lambda row: number(row.get("regularization"))):
        charts.append(Chart(REGULARIZED, [Line("loss", *of_steps(run, "regularization"), color=7)], marks=marks(run)))
    return charts


def curve_charts(name: str, data: Mapping[str, Any]) -> list[Chart]:
    """Return one chart per score of strengths.json (against drift) or soup.json (against its first score)."""
    points = mappings(data.get("points"))
    labels = list(dict.fromkeys(label for point in points for label in mapping(point.get("scores"))))
    varied = "strength" if name == "strengths" else "share"
    against = "drift" if name == "strengths" else (labels[0] if labels else "")

    def across(point: Mapping[str, Any]) -> float | None:
        found = point.get("drift") if against == "drift" else pick(point, "scores", against, "mean")
        return number(found)

    known = [point for point in points if across(point) is not None]
    first = next((point for point in known if point.get(varied) == data.get("paired_with")), None)
    charts = []
    for place, label in enumerate(label for label in labels if label != against):
        base = number(pick(first, "scores", label, "mean"))
        line = Line(
            label,
            [across(point) or 0.0 for point in known],
            [number(pick(point, "scores", label, "mean")) for point in known],
            color=place,
            style="dots",
            bars=[_bar(pick(point, "scores", label, "interval"), base) for point in known],
            names=["" if (at := number(point.get(varied))) is None else f"{at:g}" for point in known],
        )
        charts.append(Chart(label, [line], across=against))
    return charts


def _bar(interval: object, base: float | None) -> tuple[float, float] | None:
    """Return where a difference's interval lies around the first point's mean."""
    if base is None or not isinstance(interval, list) or len(interval) != 2:
        return None
    low, high = number(interval[0]), number(interval[1])
    return None if low is None or high is None else (base + low, base + high)


def _held_out(run: Run, *keys: str) -> Line:
    return Line(HELD_OUT, *of_evaluations(run, *keys), color=None, style="dots", best=run.best_step)


def _limits(run: Run, label: str) -> list[tuple[float, str]]:
    term = next((term for term, own in zip(run.rewards, run.labels, strict=True) if own == label), {})
    found = [(number(term.get(kind)), kind) for kind in ("ceiling", "floor", "target")]
    return [(value, kind) for value, kind in found if value is not None]


def _alike(one: Sequence[float | None], other: Sequence[float | None]) -> bool:
    return all(
        a is None or b is None or abs(a - b) <= 1e-6 * max(abs(a), abs(b)) for a, b in zip(one, other, strict=True)
    )


def _any(run: Run, shown: Callable[[Mapping[str, Any]], Any]) -> bool:
    rows: Iterable[Mapping[str, Any]] = run.steps
    return any(shown(row) for row in rows)
