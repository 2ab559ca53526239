"""Trackers: the metrics of a real run reach them, and a missing package is reported before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignprop_core import ImageBatch, Reward, RunConfig, Trainer
from alignprop_core.errors import ConfigError
from alignprop_core.registry.registry import default_registry
from alignprop_core.testing import tiny_pipeline


class Redness(Reward):
    def score(self, batch: ImageBatch) -> Tensor:
        return batch.images[:, 0].mean((1, 2)) - batch.images[:, 2].mean((1, 2))


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Trainer]:
    tiny_pipeline("stable_diffusion").save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a fox\ntwo owls\n")

    def build(*trackers: str) -> Trainer:
        config: dict[str, Any] = {
            "model": {"base": str(tmp_path / "model")},
            "prompts": {"train": str(tmp_path / "prompts.txt"), "heldout": str(tmp_path / "prompts.txt")},
            "sampling": {"steps": 2},
            "training": {"steps": 2, "batch_size": 2, "device": "cpu", "trackers": list(trackers)},
            "previews": {"prompts": []},
            "evaluation": {"every": 2, "at_end": False, "images_per_prompt": 1},
            "rewards": [{"name": "redness"}],
            "output": str(tmp_path / "run"),
        }
        torch.manual_seed(0)
        return Trainer(RunConfig.model_validate(config), rewards={"redness": Redness()})

    return build


NAMES = (b"total", b"redness/raw", b"grad_norm", b"heldout/total", b"heldout/redness")


def test_metrics_reach_tensorboard(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer("tensorboard").train()
    written = list((tmp_path / "run").rglob("events.out.tfevents.*"))
    content = b"".join(file.read_bytes() for file in written)
    assert [name for name in NAMES if name not in content] == []


def test_metrics_reach_weights_and_biases(
    trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: alignprop-trackers[wandb]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    trainer("wandb").train()
    (written,) = (tmp_path / "run").rglob("run-*.wandb")
    content = written.read_bytes()
    assert [name for name in NAMES if name not in content] == []


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_reported_before_anything_is_written(
    trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setattr("alignprop_trackers.trackers.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=rf'{package} is not installed.*pip install "alignprop-trackers\[{package}\]"'
    ):
        trainer(package)
    assert not (tmp_path / "run").exists()


def test_both_are_offered() -> None:
    names = {offer.name for offer in default_registry().callbacks()}
    assert {"tensorboard", "wandb"} <= names
