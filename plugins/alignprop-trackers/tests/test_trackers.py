"""Trackers: the metrics of a real run reach them, and a missing package is reported before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignprop_core import Callback, ImageBatch, Reward, RunConfig, StepStats, Trainer
from alignprop_core.errors import ConfigError
from alignprop_core.registry.registry import default_registry
from alignprop_core.testing import tiny_pipeline


class Redness(Reward):
    def score(self, batch: ImageBatch) -> Tensor:
        return batch.images[:, 0].mean((1, 2)) - batch.images[:, 2].mean((1, 2))


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Trainer]:
    pytest.importorskip("alignprop_evaluation", reason="alignprop-evaluation is not installed")
    tiny_pipeline("stable_diffusion").save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a fox\ntwo owls\n")

    def build(*trackers: str) -> Trainer:
        config: dict[str, Any] = {
            "model": {"base": str(tmp_path / "model")},
            "prompts": {"train": str(tmp_path / "prompts.txt"), "heldout": str(tmp_path / "prompts.txt")},
            "sampling": {"steps": 2},
            "training": {"steps": 2, "batch_size": 2, "device": "cpu", "trackers": list(trackers)},
            "previews": {"prompts": ["a hill"]},
            "evaluation": {"every": 2, "images_per_prompt": 1},
            "rewards": [{"name": "redness"}],
            "output": str(tmp_path / "run"),
        }
        torch.manual_seed(0)
        return Trainer(RunConfig.model_validate(config), rewards={"redness": Redness()})

    return build


NAMES = (b"total", b"redness/raw", b"grad_norm", b"heldout/total", b"heldout/redness")


def test_a_run_reaches_tensorboard(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer("tensorboard").train()
    (file,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file), size_guidance={"images": 0, "tensors": 0}).Reload()
    assert {name.decode() for name in NAMES} <= set(events.Tags()["scalars"])
    assert [image.step for image in events.Images("previews")] == [0, 2]
    assert [image.step for image in events.Images("before_after")] == [2]
    texts = {name: events.Tensors(f"{name}/text_summary")[0].tensor_proto for name in ("config", "evaluation")}
    assert b"batch_size: 2" in texts["config"].string_val[0]
    assert b"| measure | base | tuned |" in texts["evaluation"].string_val[0]
    assert b"| redness |" in texts["evaluation"].string_val[0]


def test_a_run_reaches_weights_and_biases(
    trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: alignprop-trackers[wandb]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    known: dict[str, Any] = {}

    class Watch(Callback):
        def on_start(self, trainer: Trainer) -> None:
            known.update(project=wandb.run.project, name=wandb.run.name, config=dict(wandb.run.config))

    built = trainer("wandb")
    built.callbacks.append(Watch())
    built.train()
    assert (known["project"], known["name"]) == ("alignprop", "run")
    assert known["config"] == built.config.model_dump(mode="json")
    (written,) = (tmp_path / "run").rglob("run-*.wandb")
    content = written.read_bytes()
    assert [name for name in (*NAMES, b"previews", b"before_after") if name not in content] == []
    media = [path.name for path in written.parent.rglob("files/media/*/*") if path.is_file()]
    assert sorted(name.partition("_2_")[0].partition("_0_")[0] for name in media) == [
        "before_after", "evaluation", "previews", "previews",
    ]  # fmt: skip


def test_a_failed_run_closes_its_tracker(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    built = trainer("tensorboard")
    (tracker,) = (callback for callback in built.callbacks if type(callback).__name__ == "TensorBoard")

    class Interrupt(Callback):
        def on_step(self, trainer: Trainer, stats: StepStats) -> None:
            raise KeyboardInterrupt

    built.callbacks.append(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        built.train()
    assert tracker.tracker is None  # type: ignore[attr-defined]


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
