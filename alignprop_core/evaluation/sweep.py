"""Sweeps over the strength of a LoRA, or over the shares of two: rewards against drift and diversity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from alignprop_core.evaluation.compare import Comparison, Switch
from alignprop_core.evaluation.drift import Drift
from alignprop_core.evaluation.evaluator import Evaluator


@dataclass(frozen=True)
class Sweep:
    """An evaluation at several points.

    Attributes:
        name: what is varied: "strength" or "share".
        points: its values, ascending.
        first: the point that all others are paired with.
        comparison: the evaluation, a variant a point.
    """

    name: str
    points: tuple[float, ...]
    first: float
    comparison: Comparison

    def as_json(self) -> dict[str, Any]:
        """Return prompts, seed and a list of points, each with `drift`, `diversity` and `scores`."""
        result = self.comparison.as_json()
        rows = []
        for point in self.points:
            name = f"{point:g}"
            diversity = result.get("diversity", {}).get(name)
            rows.append(
                {
                    self.name: point,
                    "drift": result["drift"][name],
                    "diversity": diversity and diversity["mean"],
                    "scores": result[name],
                }
            )
        return {
            "prompts": result["prompts"],
            "images": result["images"],
            "images_per_prompt": result["images_per_prompt"],
            "seed": result["seed"],
            "paired_with": self.first,
            "encoder": self.comparison.encoder and self.comparison.encoder.name,
            "points": rows,
        }

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Return a table: columns, and a row a point."""
        points = self.as_json()["points"]
        labels = list(points[0]["scores"])
        columns = [self.name, "drift", "diversity", *labels]
        table = []
        for point in points:
            cells = [f"{point[self.name]:g}", f"{point['drift']:.4f}"]
            cells.append("" if point["diversity"] is None else f"{point['diversity']:.4f}")
            table.append(cells + [f"{point['scores'][label]['mean']:.5g}" for label in labels])
        return columns, table


def sweep(
    evaluator: Evaluator,
    *,
    name: str,
    points: Sequence[float],
    first: float,
    apply: Callable[[float], None],
    base: Switch,
) -> Sweep:
    """Evaluate the model at several points, all with the same noise.

    Args:
        evaluator: the evaluator; the adapters of its sampler are what `apply` changes.
        name: what is varied.
        points: its values; `first` is added if it is missing.
        first: the point that all others are paired with.
        apply: sets the adapters for a point.
        base: opens a context without the adapters, for drift.
    """
    ordered = tuple(sorted({*points, first}))

    @contextmanager
    def at(point: float) -> Iterator[None]:
        apply(point)
        yield

    variants: dict[str, Switch] = {f"{p:g}": partial(at, p) for p in (first, *(p for p in ordered if p != first))}
    if len(variants) != len(ordered):
        raise ValueError("points that are equal to six digits")
    config = evaluator.config
    drift = Drift(evaluator.sampler, evaluator.prompts.prompts, base, seed=config.seed, batch_size=config.batch_size)
    return Sweep(name, ordered, first, evaluator.evaluate(variants, drift=drift))
