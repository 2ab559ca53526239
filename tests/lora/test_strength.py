"""Evaluation over strengths of a LoRA, and over shares of two."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from alignprop_core.cli import run
from alignprop_core.lora import adapters as lora
from alignprop_core.lora.files import write_files
from alignprop_lora.merging import merge
from alignprop_lora.reading import read_file
from tests.support.tiny import tiny_sd


def make_lora(folder: Path, seed: int) -> Path:
    """Write a LoRA of the tiny model with a random change."""
    unet = tiny_sd().unet
    lora.attach(unet, rank=4, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora.parameters(unet)[1::2]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    lora.save(unet, folder, name=folder.name, metadata={"alignprop.base_model": "tiny"})
    return folder


@pytest.fixture
def evaluated(tiny_model: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run `alignprop evaluate` on a random LoRA; returns what it wrote."""
    pytest.importorskip("alignprop_jpeg")
    make_lora(tmp_path / "one", 1)
    (tmp_path / "prompts.txt").write_text("a fox\nan owl\n")

    def evaluate(file: str, *arguments: str) -> dict[str, Any]:
        base = ["--model", str(tiny_model), "--lora", str(tmp_path / "one"), "--device", "cpu"]
        base += ["--prompts", str(tmp_path / "prompts.txt"), "--steps", "3", "--guidance-scale", "2"]
        base += ["--reward", "jpeg_compressibility", "--images-per-prompt", "2", "--output", str(tmp_path / "out")]
        assert run(["evaluate", *base, *arguments]) == 0
        data: dict[str, Any] = json.loads((tmp_path / "out" / file).read_text())
        return data

    return evaluate


def test_a_strength_sweep_starts_at_the_base_and_drift_grows(
    evaluated: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = evaluated("strengths.json", "--strengths", "1,0.25,0.5,0.75,1.25")
    points = data["points"]
    assert [point["strength"] for point in points] == [0, 0.25, 0.5, 0.75, 1, 1.25], "in order, with the base"
    drifts = [point["drift"] for point in points]
    assert drifts[0] == 0
    assert drifts == sorted(drifts)
    whole = evaluated("evaluation.json")
    for label in ("jpeg_compressibility", "jpeg_bytes"):
        assert points[0]["scores"][label]["mean"] == pytest.approx(whole["base"][label]["mean"], rel=1e-5)
        assert points[4]["scores"][label]["mean"] == pytest.approx(whole["tuned"][label]["mean"], rel=1e-5)
        assert points[4]["scores"][label]["interval"] == pytest.approx(whole["tuned"][label]["interval"], rel=1e-3)
    assert drifts[4] == pytest.approx(whole["drift"]["tuned"], rel=1e-5)
    assert points[4]["diversity"] == pytest.approx(whole["diversity"]["tuned"]["mean"], rel=1e-5)
    with Image.open(tmp_path / "out" / "images" / "strengths.png") as plot:
        assert plot.size[0] >= 800
    assert "strength" in capsys.readouterr().out


def test_a_soup_sweep_evaluates_the_merged_weight_changes(
    evaluated: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    two = make_lora(tmp_path / "two", 2)
    data = evaluated("soup.json", "--soup", str(two), "--strengths", "0,0.5,1")
    points = {point["share"]: point for point in data["points"]}
    read = [read_file(tmp_path / name) for name in ("one", "two")]
    for share in (0.0, 0.5, 1.0):
        merged = merge(read, [1 - share, share]).lora
        write_files(merged, tmp_path / f"merged-{share}", "merged")
        whole = evaluated("evaluation.json", "--lora", str(tmp_path / f"merged-{share}"))
        found = points[share]["scores"]["jpeg_compressibility"]["mean"]
        assert found == pytest.approx(whole["tuned"]["jpeg_compressibility"]["mean"], rel=1e-4)
        assert points[share]["drift"] == pytest.approx(whole["drift"]["tuned"], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "x", "--prompts", "p.txt", "--strengths", "0,1"], "need a LoRA"),
        (["--model", "x", "--prompts", "p.txt", "--lora", "y", "--strengths", "0;1"], "separated by commas"),
        (["--model", "x", "--prompts", "p.txt", "--lora", "y", "--strengths", "nan"], "finite numbers"),
    ],
)
def test_sweep_mistakes_have_one_message(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert run(["evaluate", *arguments]) == 2
    assert words in capsys.readouterr().err
