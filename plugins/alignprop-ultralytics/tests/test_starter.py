"""The starter's YOLO: the shipped weights file and its card."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path

from alignprop_core.weights import find_weights
from alignprop_ultralytics import alignprop_register_weights

SHIPPED = Path(str(files("alignprop_ultralytics"))) / "weights" / "yolo.safetensors"


def test_the_shipped_file_matches_the_spec() -> None:
    (spec,) = alignprop_register_weights()
    (file,) = spec.weights
    assert find_weights("starter", reward="yolo") == SHIPPED
    assert SHIPPED.stat().st_size == file.bytes
    assert hashlib.sha256(SHIPPED.read_bytes()).hexdigest() == file.sha256


def test_the_card_is_complete_and_meets_the_targets() -> None:
    card = json.loads(SHIPPED.with_suffix(".json").read_text())
    assert card.keys() >= {"architecture", "parameters", "bytes", "steps", "batch", "seconds", "scenes", "trained_on"}
    assert card["bytes"] == SHIPPED.stat().st_size <= 4_500_000
    for head in ("one_to_one", "one_to_many"):
        counted = card["thresholds"][head]["0.5"]  # the default threshold of the counting rewards
        assert counted["map50"] >= 0.95
        assert counted["hard_count_right"] >= 0.95
        assert counted["soft_hard_difference"] <= 0.3
