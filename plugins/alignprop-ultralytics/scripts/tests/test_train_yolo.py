"""The training script of the starter's YOLO, and the shipped weights on the scenes that it renders."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch

pytest.importorskip("train_rtdetr", reason="alignprop-starter[scripts] is not installed, or its scripts are not beside")

import train_yolo
from train_rtdetr import labelled_scenes

from alignprop_counting.evaluate import evaluate_detector
from alignprop_ultralytics.loading import build_detector

SHIPPED = Path(str(files("alignprop_ultralytics"))) / "weights" / "yolo.safetensors"


def test_the_shipped_file_counts_unseen_scenes() -> None:
    detector = build_detector("yolo", SHIPPED, None).eval()
    results = evaluate_detector(detector, *labelled_scenes(64, 10_000_005, "cpu"))
    assert results["map50"] >= 0.95
    assert results["hard_count_right"] >= 0.95
    assert results["soft_hard_difference"] <= 0.3


def test_targets_are_rows_of_image_class_and_box() -> None:
    classes = torch.tensor([[3, 7], [-1, -1], [5, -1]])
    boxes = torch.tensor([[[0, 0, 64, 128], [64, 64, 128, 128]], [[0] * 4] * 2, [[32, 0, 96, 64], [0] * 4]]).float()
    found = train_yolo.targets(classes, boxes)
    assert found["batch_idx"].tolist() == [0, 0, 2]
    assert found["cls"].tolist() == [3, 7, 5]
    assert found["bboxes"].tolist() == [[0.25, 0.5, 0.5, 1], [0.75, 0.75, 0.5, 0.5], [0.5, 0.25, 0.5, 0.5]]


@pytest.mark.slow
def test_the_script_writes_a_loadable_file_and_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--seconds", "1", "--scenes", "16", "--batch", "4", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["train_yolo", *options])
    train_yolo.main()
    detector = build_detector("yolo", tmp_path / "weights" / "yolo.safetensors", None)
    assert (len(detector.names), detector.image_size, detector.one_to_one) == (51, 128, True)
    card = json.loads((tmp_path / "weights" / "yolo.json").read_text())
    assert card["bytes"] < 5e6
    assert set(card["thresholds"]) == {"one_to_one", "one_to_many"}
