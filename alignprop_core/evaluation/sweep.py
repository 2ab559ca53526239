"""Curves of what an adapter does: its strength, or the shares of two, against rewards, drift and diversity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from alignprop_core.config.sections import EvaluationConfig
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.evaluation.compare import Comparison, Switch, compare
from alignprop_core.evaluation.diversity import Encoder
from alignprop_core.evaluation.drift import Drift
from alignprop_core.mix.term import Term
from alignprop_core.prompts import PromptSet


@dataclass(frozen=True)
class Curve:
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


def curve(
    sampler: Sampler,
    terms: Sequence[Term],
    prompts: PromptSet,
    config: EvaluationConfig,
    *,
    name: str,
    points: Sequence[float],
    first: float,
    put: Callable[[float], None],
    base: Callable[[], AbstractContextManager[object]],
    encoder: Encoder,
    advance: Callable[[int], object] = lambda images: None,
) -> Curve:
    """Evaluate the model at several points, all at the same noise.

    Args:
        sampler: the sampler; its adapters are what `put` changes.
        terms: what to report; labels are unique.
        prompts: held-out prompts.
        config: images per prompt, batch size, seed.
        name: what is varied.
        points: its values; `first` is added where it is missing.
        first: the point that all others are paired with.
        put: sets the adapters for a point.
        base: opens a context without the adapters, for drift.
        encoder: measures diversity.
        advance: called with the number of images just done.
    """
    ordered = tuple(sorted({*points, first}))

    @contextmanager
    def at(point: float) -> Iterator[None]:
        put(point)
        yield

    variants: dict[str, Switch] = {f"{p:g}": partial(at, p) for p in (first, *(p for p in ordered if p != first))}
    if len(variants) != len(ordered):
        raise ValueError("points that look alike to six digits")
    drift = Drift(sampler, prompts.prompts, base, seed=config.seed, batch_size=config.batch_size)
    result = compare(sampler, terms, prompts, config, variants, encoder=encoder, drift=drift, advance=advance)
    return Curve(name, ordered, first, result)
