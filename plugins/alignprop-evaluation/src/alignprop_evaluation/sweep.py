"""Evaluation at several strengths of a LoRA, or at several shares of two: rewards against drift and diversity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from alignprop_core.diffusion.sampler import LOADED, Sampler
from alignprop_core.errors import UserError
from alignprop_core.evaluation.compare import Comparison, Switch
from alignprop_core.evaluation.drift import Drift
from alignprop_core.evaluation.evaluator import Evaluator
from alignprop_core.lora import adapters
from alignprop_core.lora.layers import adapter_names

FIRST = 0.0
"""The point that all others are paired with: the base model, or the first LoRA alone."""

_OTHER = "soup"


@dataclass(frozen=True)
class Sweep:
    """An evaluation at several points.

    Attributes:
        name: what is varied: "strength" or "share".
        points: its values, ascending.
        comparison: the evaluation, one variant per point.
        soup: the second LoRA, for shares.
    """

    name: str
    points: tuple[float, ...]
    comparison: Comparison
    soup: Path | None = None

    def as_json(self) -> dict[str, Any]:
        """Return prompts, seed and a list of points, each with `drift`, `diversity` and `scores`."""
        result = self.comparison.as_json()
        rows = []
        for point in self.points:
            variant = f"{point:g}"
            diversity = result.get("diversity", {}).get(variant)
            rows.append(
                {
                    self.name: point,
                    "drift": result["drift"][variant],
                    "diversity": diversity and diversity["mean"],
                    "scores": result[variant],
                }
            )
        facts = {key: result[key] for key in ("prompts", "prompt_count", "images", "images_per_prompt", "seed")}
        soup = {} if self.soup is None else {"soup": str(self.soup)}
        return facts | {"paired_with": FIRST, "encoder": self.comparison.encoder.name, "points": rows} | soup

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the columns and rows of a table with one row per point."""
        points = self.as_json()["points"]
        rows = []
        for point in points:
            diversity = "" if point["diversity"] is None else f"{point['diversity']:.4f}"
            means = [f"{score['mean']:.5g}" for score in point["scores"].values()]
            rows.append([f"{point[self.name]:g}", f"{point['drift']:.4f}", diversity, *means])
        return [self.name, "drift", "diversity", *points[0]["scores"]], rows


def sweep(evaluator: Evaluator, points: Sequence[float], soup: Path | None = None) -> Sweep:
    """Evaluate the LoRA of the evaluator's sampler at several points, all with the same noise.

    Args:
        evaluator: the evaluator; its sampler has a loaded LoRA.
        points: strengths of the LoRA; with `soup`, shares s of the second LoRA, where the first has 1 - s. 0 is added.
        soup: a second LoRA.

    Raises:
        UserError: a LoRA changes a text encoder.
    """
    sampler, config = evaluator.sampler, evaluator.config
    denoiser = sampler.family.denoiser
    if soup is not None:
        adapters.attach_frozen(sampler.family.pipeline, soup, 0.0, _OTHER)
    names = [LOADED] if soup is None else [LOADED, _OTHER]
    _check_denoiser_only(sampler, names)

    @contextmanager
    def at(point: float) -> Iterator[None]:
        adapters.set_strength(denoiser, point if soup is None else 1 - point, name=LOADED)
        if soup is not None:
            adapters.set_strength(denoiser, point, name=_OTHER)
        yield

    @contextmanager
    def base() -> Iterator[None]:
        with ExitStack() as off:
            for name in names:
                off.enter_context(adapters.disabled(denoiser, name=name))
            yield

    # Six digits: the names of the variants, which must differ.
    ordered = tuple(sorted({FIRST, *(float(f"{point:g}") for point in points)}))
    variants: dict[str, Switch] = {f"{p:g}": partial(at, p) for p in (FIRST, *(p for p in ordered if p != FIRST))}
    drift = Drift(sampler, evaluator.prompts.prompts, base, seed=config.seed, batch_size=config.batch_size)
    return Sweep("strength" if soup is None else "share", ordered, evaluator.evaluate(variants, drift=drift), soup)


def _check_denoiser_only(sampler: Sampler, names: Sequence[str]) -> None:
    """Raise for LoRAs that change a text encoder: text embeddings are cached and would not follow the strength."""
    for component, module in sampler.family.pipeline.components.items():
        other = isinstance(module, nn.Module) and module is not sampler.family.denoiser
        if other and adapter_names(module) & set(names):
            raise UserError(f"This LoRA also changes the {component}; sweeps work only for LoRAs of the denoiser.")
