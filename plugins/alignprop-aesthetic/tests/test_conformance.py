"""The reward passes the conformance checks, with a tiny model and a tiny head of random weights."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from alignprop_clip.testing import CLIP, write_tiny_clip
from alignprop_core.testing import RewardConformance


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aesthetic")
    write_tiny_clip(folder / "clip.safetensors", dtype=torch.float32)
    g = torch.Generator().manual_seed(0)
    head = {}
    for number, (inside, outside) in zip((0, 2, 4, 6, 7), pairwise((CLIP["embed_dim"], 24, 12, 8, 6, 1)), strict=True):
        head[f"layers.{number}.weight"] = torch.randn(outside, inside, generator=g) * 2 / inside**0.5
        head[f"layers.{number}.bias"] = torch.randn(outside, generator=g)
    save_file(head, folder / "head.safetensors", metadata={"config": '{"clip": "starter"}'})
    return folder


class TestAesthetic(RewardConformance):
    reward = "aesthetic"
    skip = {"range": "random weights do not score in the typical range"}  # noqa: RUF012

    @pytest.fixture
    def reward_options(self, folder: Path) -> dict[str, Any]:
        return {"weights": str(folder / "head.safetensors"), "clip_weights": str(folder / "clip.safetensors")}
