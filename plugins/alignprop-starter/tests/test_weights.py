"""The shipped weights: they are the files the plugin names, their cards are complete and meet their bars, and what the
cards say can be seen on a handful of unseen scenes."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from alignprop_core.registry import default_registry
from alignprop_core.reward import ImageBatch
from alignprop_core.weights import find_weights
from alignprop_starter import alignprop_register_weights
from alignprop_starter.scenes import render_scenes
from alignprop_starter.vocabulary import BACKGROUNDS, SPECIES, STYLES, caption

FOLDER = Path(str(files("alignprop_starter"))) / "weights"
NAMES = ("aesthetic", "clip", "hpsv2", "rtdetr")
COMPLETE = {"architecture", "parameters", "bytes", "steps", "batch", "seconds", "trained_on"}


def card(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return result


def reward(name: str, package: str, **options: Any) -> Any:
    pytest.importorskip(package, reason=f"{package} is not installed")
    return default_registry().load_reward(name, {"weights": "starter", **options})


def test_files_are_the_ones_the_hook_names() -> None:
    specs = alignprop_register_weights()
    assert {spec.path.rpartition("/")[2] for spec in specs} == {f"{name}.safetensors" for name in NAMES}
    for spec in specs:
        (file,) = spec.weights
        path = find_weights("starter", reward=spec.reward)
        assert path == FOLDER.parent / file.file
        assert path.stat().st_size == file.bytes
        assert hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256


@pytest.mark.parametrize("name", NAMES)
def test_cards_are_complete_and_of_their_files(name: str) -> None:
    assert card(name).keys() >= COMPLETE
    assert card(name)["bytes"] == (FOLDER / f"{name}.safetensors").stat().st_size


def test_cards_meet_their_bars() -> None:
    assert card("clip")["candidates"] == 100
    assert card("clip")["text_to_image"] >= 0.9
    assert card("hpsv2")["full"]["all"] >= 0.95
    assert card("hpsv2")["open"]["all"] >= 0.95
    assert card("aesthetic")["right"]["all"] >= 0.9
    counted = card("rtdetr")["thresholds"]["0.5"]  # the threshold the counting rewards have by default
    assert counted["map50"] >= 0.95
    assert counted["hard_count_right"] >= 0.95
    assert counted["soft_hard_difference"] <= 0.3


def test_clip_finds_each_caption_s_scene_among_64() -> None:
    score = reward("clip_score", "alignprop_clip")
    scenes = render_scenes(64, seed=10_000_001)
    captions = scenes.captions()
    with torch.no_grad():
        cosines = score.encoder.prompts(captions) @ score.encoder.images(scenes.images).T
    found = [captions[i] for i in cosines.argmax(1).tolist()]
    assert sum(a == b for a, b in zip(found, captions, strict=True)) >= 58


def test_hpsv2_prefers_the_picture_that_fits() -> None:
    score = reward("hpsv2", "alignprop_hpsv2")
    from alignprop_starter.make.train_preference import render_choices

    choices = render_choices(48, 10_000_002, "cpu")
    prompts = [caption(SPECIES[s], n, STYLES[t], BACKGROUNDS[b]) for s, n, t, b in choices.truth[0].T.tolist()]
    with torch.no_grad():
        good, bad = (score(ImageBatch(images=side.float() / 255, prompts=prompts)) for side in choices.images)
    assert (good > bad).float().mean() >= 0.95


def test_aesthetic_prefers_the_better_composition() -> None:
    score = reward("aesthetic", "alignprop_aesthetic")
    from alignprop_starter.make.compositions import render_pairs

    pairs = render_pairs(50, 10_000_003, "cpu")
    prompts = [""] * 50
    with torch.no_grad():
        better, worse = (
            score(ImageBatch(images=side.float() / 255, prompts=prompts)) for side in (pairs.better, pairs.worse)
        )
    assert (better > worse).float().mean() >= 0.9
    assert 1 < worse.min() < better.max() < 10


def test_rtdetr_counts_unseen_scenes_softly_and_hard() -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: alignprop-starter[make]")
    detector = reward("hard_count", "alignprop_counting", detector="rtdetr").detector
    from alignprop_counting.evaluate import evaluate_detector
    from alignprop_starter.make.train_detr import labelled_scenes

    figures = evaluate_detector(detector, *labelled_scenes(64, 10_000_004, "cpu"))
    assert figures["map50"] >= 0.95
    assert figures["hard_count_right"] >= 0.95
    assert figures["soft_hard_difference"] <= 0.3
