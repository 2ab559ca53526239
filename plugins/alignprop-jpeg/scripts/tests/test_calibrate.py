"""The calibration script: both tables and the example image, on a few crops."""

from __future__ import annotations

from pathlib import Path

import calibrate
import pytest
import torch
from jpeg_accuracy import QUALITIES, crops, true_size
from PIL import Image


def test_the_tables_have_a_row_per_set_and_quality() -> None:
    sets = [("photographs, 64 px", crops(64, 1)[:3])]
    accuracy, decreases = "\n".join(calibrate.report(sets)).split("\n\n")
    assert accuracy.count("| photographs, 64 px | 3 |") == len(QUALITIES)
    assert decreases.count("| photographs, 64 px | background flat |") == len(QUALITIES)
    margins = list(calibrate.margins(sets, [1.0, 1.25]))
    assert [line.split(" | ")[0] for line in margins[2:]] == ["| 1.00"] * len(QUALITIES) + ["| 1.25"] * len(QUALITIES)


def test_the_example_shows_a_smaller_and_a_larger_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimize = calibrate.optimize
    monkeypatch.setattr(calibrate, "optimize", lambda image, sign: optimize(image, sign, steps=2))
    original, small, large = calibrate.save_example(tmp_path / "example.webp")
    assert small < original < large
    with Image.open(tmp_path / "example.webp") as image:
        assert image.size == (3 * 192, 192)


def test_optimizing_pixels_changes_the_true_size() -> None:
    images = crops(64, 1)[:2]
    small, large = (calibrate.optimize(images, sign, steps=3) for sign in (-1, 1))
    assert torch.all(true_size(small, 95) < true_size(images, 95))
    assert torch.all(true_size(large, 95) > true_size(images, 95))
