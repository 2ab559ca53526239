"""The reward passes the conformance checks with both kinds of preprocessing, with a tiny model of random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignprop_clip.testing import write_tiny_clip
from alignprop_core.testing import RewardConformance


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_clip(tmp_path_factory.mktemp("hpsv2") / "tiny.safetensors", dtype=torch.float32))


class TestHpsv2(RewardConformance):
    reward = "hpsv2"
    skip = {"range": "random weights do not score in the typical range"}  # noqa: RUF012

    @pytest.fixture
    def reward_options(self, weights: str) -> dict[str, Any]:
        return {"weights": weights}


class TestHpsv2CenterCrop(TestHpsv2):
    @pytest.fixture
    def reward_options(self, weights: str) -> dict[str, Any]:
        return {"weights": weights, "preprocessing": "center_crop"}
