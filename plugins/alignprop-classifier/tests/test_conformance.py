"""The rewards pass the conformance checks with timm's smallest network and with EfficientNet-Lite's real weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from alignprop_core.testing import RewardConformance


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        safetensors.torch.save_file(timm.create_model("test_efficientnet", num_classes=3).state_dict(), path)
    return path


class TestImageClassifier(RewardConformance):
    reward = "image_classifier"

    @pytest.fixture
    def reward_options(self, tiny: Path) -> dict[str, Any]:
        names = ["cat", "dog", "bird"]
        return {"model": "timm/test_efficientnet", "weights": str(tiny), "classes": names, "image_size": 64}


class TestClassifierAccuracy(TestImageClassifier):
    reward = "classifier_accuracy"


@pytest.mark.slow  # the real network at 224 px, in float64 too
class TestEfficientNetLite(RewardConformance):
    reward = "image_classifier"
    options = {"target": "tabby"}  # noqa: RUF012
