"""The shipped weights match their specs, and their cards are complete and meet the targets."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from alignprop_core.registry.registry import default_registry
from alignprop_core.weights import find_weights
from alignprop_starter import alignprop_register_weights
from alignprop_starter.scenes import render_scenes

FOLDER = Path(str(files("alignprop_starter"))) / "weights"
NAMES = ("aesthetic", "clip", "hpsv2", "rtdetr")
COMPLETE = {"architecture", "parameters", "bytes", "steps", "batch", "seconds", "trained_on"}


def card(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return result


def reward(name: str, package: str, **options: Any) -> Any:
    pytest.importorskip(package, reason=f"{package} is not installed")
    return default_registry().load_reward(name, {"weights": "starter", **options})


def test_files_match_their_specs() -> None:
    specs = alignprop_register_weights()
    assert {spec.path.rpartition("/")[2] for spec in specs} == {f"{name}.safetensors" for name in NAMES}
    for spec in specs:
        (file,) = spec.weights
        path = find_weights("starter", reward=spec.reward)
        assert path == FOLDER.parent / file.file
        assert path.stat().st_size == file.bytes
        assert hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256


@pytest.mark.parametrize("name", NAMES)
def test_cards_are_complete_and_match_their_files(name: str) -> None:
    assert card(name).keys() >= COMPLETE
    assert card(name)["bytes"] == (FOLDER / f"{name}.safetensors").stat().st_size


def test_cards_meet_the_targets() -> None:
    assert card("clip")["candidates"] == 100
    assert card("clip")["text_to_image"] >= 0.9
    assert card("hpsv2")["full"]["all"] >= 0.95
    assert card("hpsv2")["open"]["all"] >= 0.95
    assert card("aesthetic")["right"]["all"] >= 0.9
    counted = card("rtdetr")["thresholds"]["0.5"]  # the default threshold of the counting rewards
    assert counted["map50"] >= 0.95
    assert counted["hard_count_right"] >= 0.95
    assert counted["soft_hard_difference"] <= 0.3


def test_clip_retrieves_the_scene_of_each_caption_among_64() -> None:
    score = reward("clip_score", "alignprop_clip")
    scenes = render_scenes(64, seed=10_000_001)
    captions = scenes.captions()
    with torch.no_grad():
        cosines = score.encoder.prompts(captions) @ score.encoder.images(scenes.images).T
    found = [captions[i] for i in cosines.argmax(1).tolist()]
    assert sum(a == b for a, b in zip(found, captions, strict=True)) >= 58
