"""`alignprop demo`: it replaces only its own run, and runs the demo of any registered model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignprop_core.cli import run
from alignprop_core.testing import tiny_pipeline
from alignprop_core.testing.fixtures import temporary_plugin  # noqa: F401

PLUGIN = """\
from pathlib import Path

from alignprop_core.hookspecs import hookimpl
from alignprop_core.specs import ModelSpec


def folder():
    return Path(__file__).parent / "pipeline"


@hookimpl
def alignprop_register_models():
    return [
        ModelSpec(name="toy", summary="Tiny.", path="toy_model:folder", demo="toy_model:toy.yaml"),
        ModelSpec(name="plain", summary="Tiny.", path="toy_model:folder"),
    ]
"""
DEMO = """\
model: {base: toy}
prompts: {train: [a fox], heldout: [an owl]}
sampling: {steps: 2}
rewards: [{name: jpeg_compressibility}]
evaluation: {images_per_prompt: 1}
training: {steps: 2, batch_size: 2, device: cpu}
output: runs/toy
"""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_demo_replaces_no_other_run(capsys: pytest.CaptureFixture[str]) -> None:
    mine = Path("runs/mine")
    mine.mkdir(parents=True)
    config: dict[str, Any] = {
        "model": {"base": "starter"}, "prompts": {"train": "mine.txt"}, "rewards": [{"name": "aesthetic"}],
    }  # fmt: skip
    (mine / "config.yaml").write_text(yaml.safe_dump(config))
    (mine / "mine-000001.safetensors").write_bytes(b"work of days")
    assert run(["demo", "--output", str(mine), "training.steps=1"]) == 2
    assert str(mine) in capsys.readouterr().err
    assert (mine / "mine-000001.safetensors").read_bytes() == b"work of days"


def test_a_model_of_another_plugin_has_a_demo_too(
    temporary_plugin: Callable[..., str],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    temporary_plugin("toy-model", {"toy_model/__init__.py": PLUGIN, "toy_model/toy.yaml": DEMO})
    import toy_model

    tiny_pipeline("stable_diffusion").save_pretrained(toy_model.folder())
    command = ["demo", "--model", "toy", "training.steps=1"]
    assert run(command) == 0
    assert "before_after.png" in "".join(capsys.readouterr().out.split())
    assert Path("demo/images/before_after.png").is_file()
    assert len(Path("demo/metrics.jsonl").read_text().splitlines()) == 1
    assert yaml.safe_load(Path("demo/config.yaml").read_text())["model"]["base"] == "toy"
    assert run([*command, "training.steps=2"]) == 0, "an earlier run of the demo is replaced"
    assert len(Path("demo/metrics.jsonl").read_text().splitlines()) == 2
    assert run(["demo", "--model", "plain"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message == 'error: Model "plain" has no demo; these have one: starter, toy.'
