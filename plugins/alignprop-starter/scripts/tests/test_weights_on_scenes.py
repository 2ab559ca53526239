"""The shipped weights on unseen scenes that the training scripts render."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compositions import render_pairs

from alignprop_core.registry.registry import default_registry
from alignprop_core.reward import ImageBatch
from alignprop_starter.vocabulary import BACKGROUNDS, SPECIES, STYLES, caption


def reward(name: str, package: str, **options: Any) -> Any:
    pytest.importorskip(package, reason=f"{package} is not installed")
    return default_registry().load_reward(name, {"weights": "starter", **options})


def test_hpsv2_prefers_the_matching_image() -> None:
    score = reward("hpsv2", "alignprop_hpsv2")
    pytest.importorskip("open_clip", reason="open_clip is not installed: alignprop-starter[scripts]")
    from train_preference import render_choices

    choices = render_choices(48, 10_000_002, "cpu")
    prompts = [caption(SPECIES[s], n, STYLES[t], BACKGROUNDS[b]) for s, n, t, b in choices.truth[0].T.tolist()]
    with torch.no_grad():
        good, bad = (score(ImageBatch(images=side.float() / 255, prompts=prompts)) for side in choices.images)
    assert (good > bad).float().mean() >= 0.95


def test_aesthetic_prefers_the_better_composition() -> None:
    score = reward("aesthetic", "alignprop_aesthetic")
    pairs = render_pairs(50, 10_000_003, "cpu")
    prompts = [""] * 50
    with torch.no_grad():
        better, worse = (
            score(ImageBatch(images=side.float() / 255, prompts=prompts)) for side in (pairs.better, pairs.worse)
        )
    assert (better > worse).float().mean() >= 0.9
    assert 1 < worse.min() < better.max() < 10


def test_rtdetr_counts_unseen_scenes() -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: alignprop-starter[scripts]")
    detector = reward("hard_count", "alignprop_counting", detector="rtdetr").detector
    from train_rtdetr import labelled_scenes

    from alignprop_counting.evaluate import evaluate_detector

    results = evaluate_detector(detector, *labelled_scenes(64, 10_000_004, "cpu"))
    assert results["map50"] >= 0.95
    assert results["hard_count_right"] >= 0.95
    assert results["soft_hard_difference"] <= 0.3
