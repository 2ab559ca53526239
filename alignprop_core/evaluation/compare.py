"""Compare variants of a model on the same prompts and noise: scores, diversity and drift."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from alignprop_core.config.sections import EvaluationConfig
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.evaluation.diversity import Encoder, diversity_by_prompt
from alignprop_core.evaluation.drift import Drift
from alignprop_core.evaluation.statistics import paired, summary
from alignprop_core.mix.term import Term
from alignprop_core.prompts import PromptSet
from alignprop_core.reward import ImageBatch

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
        encoder: what diversity was measured with; None if it was not measured.
    """

    prompts: PromptSet
    config: EvaluationConfig
    variants: dict[str, Variant]
    encoder: Encoder | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the content of evaluation.json; every variant after the first is paired with the first."""
        names = list(self.variants)
        base = self.variants[names[0]].scores
        result: dict[str, Any] = {
            "prompts": self.prompts.name,
            "images": len(next(iter(base.values()))),
            "images_per_prompt": self.config.images_per_prompt,
            "seed": self.config.seed,
        }
        for name in names:
            scores = self.variants[name].scores
            result[name] = {
                label: summary(values) | ({} if name == names[0] else paired(base[label], values))
                for label, values in scores.items()
            }
        if self.encoder is not None and (first := self.variants[names[0]].diversity):
            result["diversity"] = {"encoder": self.encoder.name} | {
                name: summary(values) | ({} if name == names[0] else paired(first, values))
                for name, values in ((name, self.variants[name].diversity) for name in names)
            }
        if any(variant.drift is not None for variant in self.variants.values()):
            result["drift"] = {name: variant.drift for name, variant in self.variants.items()}
        return result


def compare(
    sampler: Sampler,
    terms: Sequence[Term],
    prompts: PromptSet,
    config: EvaluationConfig,
    variants: Mapping[str, Switch] | None = None,
    *,
    encoder: Encoder | None = None,
    drift: Drift | None = None,
    advance: Callable[[int], object] = lambda images: None,
) -> Comparison:
    """Sample and score every prompt with each variant of the model at the same noise.

    Args:
        sampler: the sampler.
        terms: rewards and measures to report; labels are unique.
        prompts: held-out prompts.
        config: images per prompt, batch size, seed.
        variants: name -> context in which the model is that variant; base first. None is the current model.
        encoder: measures the diversity of each prompt's images; None skips it.
        drift: measures each variant's distance from the base model; None skips it.
        advance: called with the number of images finished since the last call.
    """
    variants = variants or {"model": nullcontext}
    per = config.images_per_prompt
    # (prompt, global sample index): the index alone decides an image's noise, so batches do not change the images.
    jobs = [
        (prompt, index) for prompt in range(len(prompts.prompts)) for index in range(prompt * per, (prompt + 1) * per)
    ]
    results = {name: Variant({term.label: [] for term in terms}) for name in variants}
    features: dict[str, list[Tensor]] = {name: [] for name in variants}
    for start in range(0, len(jobs), config.batch_size):
        part = jobs[start : start + config.batch_size]
        texts = [prompts.prompts[prompt] for prompt, _ in part]
        noise = sampler.noise(texts, seed=config.seed, step=0, indices=[index for _, index in part])
        # All variants take the same noise: differences between them are paired.
        for name, switch in variants.items():
            with switch(), torch.no_grad():
                # (b, 3, H, W) in [0, 1]
                images = sampler.decode(sampler.sample(texts, noise).latents)
                batch = ImageBatch(
                    images=images, prompts=texts, metadata=[prompts.metadata[prompt] for prompt, _ in part]
                )
                for term in terms:
                    results[name].scores[term.label] += term.score(batch).tolist()
                if encoder is not None and per > 1:
                    features[name].append(encoder.features(images).cpu())
            firsts = [row for row, (_, index) in enumerate(part) if index % per == 0]
            # Only each prompt's first image is kept, as uint8: all images of a long list would fill the memory.
            results[name].images += list((images[firsts] * 255).round().to(torch.uint8).cpu())
            advance(len(part))
    for name, switch in variants.items():
        if features[name]:
            results[name].diversity = diversity_by_prompt(torch.cat(features[name]), per)
        if drift is not None:
            with switch():
                results[name].drift = drift.measure()
    return Comparison(prompts, config, results, encoder)
