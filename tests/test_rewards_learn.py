"""Every reward with a gradient teaches: a few training steps on one batch, and that batch scores higher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignprop_core.config.sections import RunConfig
from alignprop_core.diffusion.noise import Noise
from alignprop_core.registry.registry import default_registry
from alignprop_core.reward import ImageBatch
from alignprop_core.training.objective import backpropagate
from alignprop_core.training.trainer import Trainer

pytest.importorskip("alignprop_starter")

PICTURES = str(Path(__file__).parents[1] / "examples" / "reference_pictures")
PROMPTS = ("two foxes in the snow", "a horse in a meadow")
STEPS = 3
STARTER = {"weights": "starter"}
NONE = {"number": 0, "sharpness": 1.0}

#: Name of the case -> reward, its options. The wishes are ones the base model does not meet: a score that is at its
#: best, or a detector that is quite sure, has nothing to teach. So none of the animals are asked for, or other ones.
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
    "reference_similarity": ("reference_similarity", {**STARTER, "folder": PICTURES, "compare": "mean"}),
    "siglip_score": ("siglip_score", STARTER),
}


def test_every_reward_with_a_gradient_is_here() -> None:
    offered = {
        offer.name
        for offer in default_registry().rewards()
        if offer.spec.differentiable and offer.distribution.startswith("alignprop-")
    }
    assert offered == {name for name, _ in CASES.values()}


@pytest.mark.parametrize("case", CASES)
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
    noise = trainer.sampler.noise(PROMPTS, seed=0, step=0)
    metadata: list[dict[str, Any]] = [{} for _ in PROMPTS]
    totals = []
    for _ in range(STEPS):
        trainer.optimizer.zero_grad(set_to_none=True)
        outcome = backpropagate(trainer.sampler, trainer.mix, PROMPTS, metadata, noise, share=1 / len(PROMPTS))
        torch.nn.utils.clip_grad_norm_(trainer.parameters, 1.0)
        trainer.optimizer.step()
        totals.append(float(outcome.total.mean()))
    totals.append(float(scores(trainer, noise).mean()))
    assert totals[-1] > totals[0], totals


@torch.no_grad()
def scores(trainer: Trainer, noise: Noise) -> Tensor:
    """The reward's scores of the batch as the adapters are now."""
    images = trainer.sampler.decode(trainer.sampler.sample(PROMPTS, noise).latents)
    (term,) = trainer.mix.terms
    result: Tensor = term.reward(ImageBatch(images=images, prompts=PROMPTS))
    return result
