"""The rewards on a CLIP model measure diversity too: `evaluation.diversity_encoder` names one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from alignprop_core.config.rewards import RewardTerm
from alignprop_core.config.sections import RunConfig
from alignprop_core.evaluation.diversity import diversity_by_prompt, encoder_of
from alignprop_core.mix.load import load_terms
from alignprop_core.registry.registry import default_registry
from alignprop_core.training.train import train
from tests.support import ROOT

pytest.importorskip("alignprop_starter")

REFERENCE_IMAGES = str(ROOT / "examples" / "reference_images")
REWARDS: dict[str, dict[str, Any]] = {
    "aesthetic": {},
    "clip_score": {},
    "hpsv2": {},
    "pickscore": {},
    "reference_similarity": {"folder": REFERENCE_IMAGES},
    "siglip_score": {},
}


@pytest.mark.parametrize("name", REWARDS)
def test_an_encoder_distinguishes_different_animals_from_the_same_one(name: str) -> None:
    """With the starter's weights: two scenes of one animal are closer than scenes of two animals."""
    from alignprop_starter.scenes import render_scenes

    entry = RewardTerm(name=name, options={"weights": "starter", **REWARDS[name]})
    encoder = encoder_of(name, load_terms([entry], default_registry()))
    scenes = render_scenes(48, seed=5)
    with torch.no_grad():
        features = encoder.features(scenes.images)
    assert features.shape[0] == 48
    torch.testing.assert_close(features.norm(dim=1), torch.ones(48))
    distances = torch.cdist(features, features)
    species = torch.as_tensor(scenes.layout.species)
    same = (species[:, None] == species) & ~torch.eye(48, dtype=torch.bool)
    assert same.any()
    other = species[:, None] != species
    assert distances[same].mean() < 0.8 * distances[other].mean()
    assert diversity_by_prompt(features[:1].repeat(2, 1), 2) == pytest.approx([0], abs=1e-6)


def test_a_run_measures_diversity_with_clip_score(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.txt").write_text("a cat\ntwo dogs\n")
    config = RunConfig.model_validate(
        {
            "model": {"base": str(tiny_model)},
            "prompts": {name: str(tmp_path / f"{name}.txt") for name in ("train", "heldout")},
            "sampling": {"steps": 2},
            "lora": {"rank": 2},
            "rewards": [{"name": "jpeg_compressibility"}],
            "evaluation": {
                "every": 1,
                "images_per_prompt": 2,
                "rewards": [{"name": "clip_score", "options": {"weights": "starter"}}],
                "diversity_encoder": "clip_score",
            },
            "training": {"steps": 1, "batch_size": 1, "device": "cpu"},
            "output": str(tmp_path / "run"),
        }
    )
    found = json.loads((train(config) / "evaluation.json").read_text())["diversity"]
    assert found["encoder"] == "clip_score"
    assert 0 < found["base"]["mean"] < 2
