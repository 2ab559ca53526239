"""The starter's YOLO: the shipped file and its card, and the script that trains it."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from alignprop_core.weights import find_weights
from alignprop_counting.evaluate import evaluate_detector
from alignprop_ultralytics import alignprop_register_weights
from alignprop_ultralytics.loading import build_detector

training: Any = pytest.importorskip("alignprop_ultralytics.make_starter", reason="alignprop-starter is not installed")

SHIPPED = Path(str(files("alignprop_ultralytics"))) / "weights" / "yolo.safetensors"


def test_the_shipped_file_is_the_one_the_hook_names() -> None:
    (spec,) = alignprop_register_weights()
    (file,) = spec.weights
    assert find_weights("starter", reward="yolo") == SHIPPED
    assert SHIPPED.stat().st_size == file.bytes
    assert hashlib.sha256(SHIPPED.read_bytes()).hexdigest() == file.sha256


def test_the_card_is_complete_and_meets_the_bars() -> None:
    card = json.loads(SHIPPED.with_suffix(".json").read_text())
    assert card.keys() >= {"architecture", "parameters", "bytes", "steps", "batch", "seconds", "scenes", "trained_on"}
    assert card["bytes"] == SHIPPED.stat().st_size <= 4_500_000
    for head in ("one_to_one", "one_to_many"):
        counted = card["thresholds"][head]["0.5"]  # the threshold the counting rewards have by default
        assert counted["map50"] >= 0.95
        assert counted["hard_count_right"] >= 0.95
        assert counted["soft_hard_difference"] <= 0.3


def test_the_shipped_file_counts_unseen_scenes_softly_and_hard() -> None:
    detector = build_detector("yolo", SHIPPED, None).eval()
    figures = evaluate_detector(detector, *training.labelled_scenes(64, 10_000_005, "cpu"))
    assert figures["map50"] >= 0.95
    assert figures["hard_count_right"] >= 0.95
    assert figures["soft_hard_difference"] <= 0.3


def test_targets_are_rows_of_picture_class_and_box() -> None:
    classes = torch.tensor([[3, 7], [-1, -1], [5, -1]])
    boxes = torch.tensor([[[0, 0, 64, 128], [64, 64, 128, 128]], [[0] * 4] * 2, [[32, 0, 96, 64], [0] * 4]]).float()
    found = training.targets(classes, boxes)
    assert found["batch_idx"].tolist() == [0, 0, 2]
    assert found["cls"].tolist() == [3, 7, 5]
    assert found["bboxes"].tolist() == [[0.25, 0.5, 0.5, 1], [0.75, 0.75, 0.5, 0.5], [0.5, 0.25, 0.5, 0.5]]


@pytest.mark.slow
def test_the_script_writes_a_file_that_loads_and_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--seconds", "1", "--scenes", "16", "--batch", "4", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["make_starter", *options])
    training.main()
    detector = build_detector("yolo", tmp_path / "weights" / "yolo.safetensors", None)
    assert (len(detector.names), detector.image_size, detector.one_to_one) == (51, 128, True)
    card = json.loads((tmp_path / "weights" / "yolo.json").read_text())
    assert card["bytes"] < 5e6
    assert set(card["thresholds"]) == {"one_to_one", "one_to_many"}
