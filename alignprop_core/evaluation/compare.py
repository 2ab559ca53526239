"""The result of comparing variants of a model on the same prompts and noise: scores, diversity and drift."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from alignprop_core.config.sections import EvaluationConfig
from alignprop_core.evaluation.diversity import Encoder
from alignprop_core.evaluation.statistics import paired, summary
from alignprop_core.prompts import PromptSet

Switch = Callable[[], AbstractContextManager[object]]
"""Opens a context in which the model is one of the compared variants."""


@dataclass
class Variant:
    """Images and scores of one variant of the model, in prompt order.

    Attributes:
        scores: label -> one score per image.
        images: (N, 3, H, W) uint8 on the CPU: the first image of each prompt.
        diversity: mean distance between the images of a prompt, one value per prompt; empty if not measured.
        drift: relative change of the prediction from the base model's; None if not measured.
    """

    scores: dict[str, list[float]] = field(default_factory=dict)
    images: list[Tensor] = field(default_factory=list)
    diversity: list[float] = field(default_factory=list)
    drift: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The result of an evaluation.

    Attributes:
        prompts: the held-out prompts.
        config: images per prompt, batch size, seed.
        variants: name -> images and scores; the first variant is the one that the others are compared with.
        encoder: what diversity is measured with.
    """

    prompts: PromptSet
    config: EvaluationConfig
    variants: dict[str, Variant]
    encoder: Encoder

    def as_json(self) -> dict[str, Any]:
        """Return the content of evaluation.json; every variant after the first is paired with the first."""
        first, *others = self.variants
        base = self.variants[first]

        def statistics(name: str, values: Sequence[float], paired_with: Sequence[float], per: int) -> dict[str, Any]:
            return summary(values) | (paired(paired_with, values, per) if name in others else {})

        result: dict[str, Any] = {
            "prompts": self.prompts.name,
            "prompt_count": len(self.prompts),
            "images": len(next(iter(base.scores.values()))),
            "images_per_prompt": self.config.images_per_prompt,
            "seed": self.config.seed,
        }
        for name, variant in self.variants.items():
            result[name] = {
                label: statistics(name, values, base.scores[label], self.config.images_per_prompt)
                for label, values in variant.scores.items()
            }
        if base.diversity:
            result["diversity"] = {"encoder": self.encoder.name} | {
                name: statistics(name, variant.diversity, base.diversity, 1) for name, variant in self.variants.items()
            }
        if any(variant.drift is not None for variant in self.variants.values()):
            result["drift"] = {name: variant.drift for name, variant in self.variants.items()}
        return result
