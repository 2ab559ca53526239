"""The four rewards pass the conformance checks, with tiny models of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from alignprop_clip.testing import write_tiny_clip
from alignprop_core.testing import RewardConformance, natural_images

RANDOM = {"range": "random weights do not score in the typical range"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_clip(tmp_path_factory.mktemp("clip") / "clip.safetensors", dtype=torch.float32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i, image in enumerate((natural_images(4)[2:] * 255).byte().permute(0, 2, 3, 1)):
        Image.fromarray(image.numpy()).save(folder / f"{i}.png")
    return folder


class TestClipScore(RewardConformance):
    reward = "clip_score"
    skip = RANDOM

    @pytest.fixture
    def reward_options(self, weights: str) -> dict[str, Any]:
        return {"weights": weights}


class TestPickScore(TestClipScore):
    reward = "pickscore"


class TestSiglipScore(TestClipScore):
    reward = "siglip_score"


class TestReferenceSimilarity(RewardConformance):
    reward = "reference_similarity"
    skip = RANDOM

    @pytest.fixture
    def reward_options(self, weights: str, folder: Path) -> dict[str, Any]:
        return {"weights": weights, "folder": str(folder)}
