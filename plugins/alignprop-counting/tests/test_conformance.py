"""The rewards pass the shipped conformance checks, with a tiny RT-DETR with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alignprop_core.testing import RewardConformance


class TestObjectCount(RewardConformance):
    reward = "object_count"
    prompts = ("three foxes", "a cat and two birds", "4 traffic lights")

    @pytest.fixture
    def reward_options(self, weights: dict[str, Path]) -> dict[str, Any]:
        return {"detector": "rtdetr", "weights": str(weights["rtdetr"]), "threshold": 0.2}


class TestObjectPresence(TestObjectCount):
    reward = "object_presence"


class TestObjectAbsence(TestObjectCount):
    reward = "object_absence"
    prompts = ("no foxes", "no cat", "no birds")


class TestHardCount(TestObjectCount):
    reward = "hard_count"


class TestHardPresence(TestObjectCount):
    reward = "hard_presence"


class TestHardAbsence(TestObjectAbsence):
    reward = "hard_absence"
