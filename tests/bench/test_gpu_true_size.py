"""The benchmark at true size runs, with tiny networks, and its networks have the public models' sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.bench import gpu_true_size
from tests.bench.gpu_models import defaults
from tests.bench.gpu_true_models import MODELS


def test_models_train_and_a_failure_does_not_stop_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu_true_size.build

    def build(name: str, *arguments: object, **named: bool) -> object:
        if name == "flux_dev":
            raise torch.OutOfMemoryError
        return real(name, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(gpu_true_size, "build", build)
    command = [
        "--tiny",
        "--rounds",
        "1",
        "--steps",
        "2",
        "--out",
        str(tmp_path),
        "flux_dev",
        "z_image",
        "sdxl_vs_plain",
    ]
    assert gpu_true_size.main(command) == 1
    failed, trained, compared = [json.loads(line) for line in (tmp_path / "true_size.jsonl").read_text().splitlines()]
    assert failed["error"].startswith("OutOfMemoryError")
    assert trained["gradient_norm"] > 0
    assert min(compared["ours"]["gradient_norm"], compared["plain"]["gradient_norm"], compared["ratio"]) > 0


@pytest.mark.parametrize(
    ("name", "part", "billions"),
    [
        ("sdxl", "unet", 2.567),
        ("sd35_medium", "transformer", 2.243),
        ("flux_dev", "transformer", 11.901),
        ("flux2_klein_4b", "transformer", 3.876),
        ("z_image", "transformer", 6.155),
    ],
)
def test_a_true_model_has_the_public_models_size_and_its_parts_fit(name: str, part: str, billions: float) -> None:
    _, kind, networks, rest = MODELS[name]
    with defaults(torch.device("meta"), torch.bfloat16):
        parts = networks()
    size = sum(parameter.numel() for parameter in parts[part].parameters())
    assert size / 1e9 == pytest.approx(billions, abs=0.01)
    gpu_true_size.Sampler(kind(**parts, **rest()), gpu_true_size.SamplingConfig(guidance_scale=1))
