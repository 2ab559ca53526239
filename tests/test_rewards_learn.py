"""Every differentiable reward can be trained on: after a few steps on one batch, that batch scores higher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignprop_core.config.sections import RunConfig
from alignprop_core.registry.registry import default_registry
from alignprop_core.reward import ImageBatch
from alignprop_core.training.step import choose_prompts
from alignprop_core.training.trainer import Trainer

pytest.importorskip("alignprop_starter")

REFERENCE_IMAGES = str(Path(__file__).parents[1] / "examples" / "reference_images")
PROMPTS = ("two foxes in the snow", "a horse in a meadow")
STEPS = 3
STARTER = {"weights": "starter"}
NONE = {"number": 0, "sharpness": 1.0}

#: Name of the case -> reward, its options. The prompts' animals are not what these rewards ask for, because a score at
#: its maximum, or a detector that is certain, has no gradient.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "jpeg_compressibility": ("jpeg_compressibility", {"quality": 95}),
    "jpeg_incompressibility": ("jpeg_incompressibility", {"quality": 95}),
    "aesthetic": ("aesthetic", STARTER),
    "clip_score": ("clip_score", STARTER),
    "hpsv2": ("hpsv2", STARTER),
    "image_classifier": ("image_classifier", {}),
    "object_absence": ("object_absence", {**STARTER, "objects": ["fox", "horse"]}),
    "object_count": ("object_count", {**STARTER, **NONE}),
    "object_count_yolo": ("object_count", {**STARTER, **NONE, "detector": "yolo"}),
    "object_presence": ("object_presence", {**STARTER, "objects": "cat"}),
    "pickscore": ("pickscore", STARTER),
    "reference_similarity": ("reference_similarity", {**STARTER, "folder": REFERENCE_IMAGES, "compare": "mean"}),
    "siglip_score": ("siglip_score", STARTER),
}


def test_every_reward_with_a_gradient_is_here() -> None:
    offered = {
        offer.name
        for offer in default_registry().rewards()
        if offer.spec.differentiable and offer.distribution.startswith("alignprop-")
    }
    assert offered == {name for name, _ in CASES.values()}


QUICK = {"jpeg_compressibility", "hpsv2", "object_count"}
"""One reward of each kind; tests/test_examples.py trains on the others as well, for a step."""


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in QUICK else pytest.mark.slow) for c in CASES])
def test_the_batch_scores_higher_after_a_few_steps(case: str, tmp_path: Path) -> None:
    name, options = CASES[case]
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    config = RunConfig.model_validate(
        {
            "model": {"base": "starter"},
            "prompts": {"train": str(tmp_path / "prompts.txt")},
            "sampling": {"steps": 4, "guidance_scale": 3.0},
            "backprop": {"strategy": "last_k", "k": 1},
            "rewards": [{"name": name, "options": options}],
            "training": {"steps": STEPS, "batch_size": len(PROMPTS), "device": "cpu"},
            "output": str(tmp_path / "run"),
        }
    )
    trainer = Trainer(config)
    totals = []
    for _ in range(STEPS):  # on the batch of step 0 every time
        trainer.optimizer.zero_grad()
        totals.append(trainer.gradient.compute(0).total)
        trainer.optimizer.step()
    totals.append(float(scores(trainer).mean()))
    assert totals[-1] > totals[0], totals


@torch.no_grad()
def scores(trainer: Trainer) -> Tensor:
    """Return the reward's scores of that batch with the present adapters, (B,)."""
    order = choose_prompts(len(PROMPTS), seed=0, step=0, indices=range(len(PROMPTS)))
    prompts = [PROMPTS[i] for i in order]
    noise = trainer.sampler.noise(prompts, seed=0, step=0)
    images = trainer.sampler.decode(trainer.sampler.sample(prompts, noise).latents)
    (term,) = trainer.mix.terms
    return term.score(ImageBatch(images=images, prompts=prompts))
