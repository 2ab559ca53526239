"""The shipped conformance checks on `object_count`, with a YOLO with random weights as its detector."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alignprop_core.testing import RewardConformance


@pytest.fixture(scope="module")
def file(tiny: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tiny.write(tiny.build("yolo11n"), tmp_path_factory.mktemp("yolo") / "yolo11n.safetensors")
    return path


class TestObjectCountWithYolo(RewardConformance):
    reward = "object_count"
    skip = {"range": "a random network detects far more objects than a prompt asks for"}  # noqa: RUF012
    prompts = ("three foxes", "a cat and two birds", "4 traffic lights")

    @pytest.fixture
    def reward_options(self, file: Path) -> dict[str, Any]:
        return {"detector": "yolo11n", "weights": str(file), "threshold": 0.2}
