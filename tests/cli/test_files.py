"""Commands do not overwrite the files of others and keep every file they write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from alignprop_core.cli import run
from alignprop_core.cli.sample import distinct


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_prompts_with_one_name_get_a_file_each(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distinct(["fox", "owl", "fox", "fox"]) == ["fox", "owl", "fox_2", "fox_3"]
    command = ["sample", "a fox!", "a fox?", "--model", str(tiny_model), "--steps", "1", "--output", "generated"]
    assert run(command) == 0
    files = capsys.readouterr().out.split()
    assert len(set(files)) == 2
    assert all(Path(file).is_file() for file in files)


def test_an_empty_prompt_is_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (64, 64), "red").save("red.png")
    command = ["score", "red.png", "--reward", "clip_score", "-o", "weights=starter", "--json"]
    assert run(command) == 2
    assert "give --prompt" in capsys.readouterr().err
    assert run([*command, "--prompt", ""]) == 0
    assert "clip_score" in json.loads(capsys.readouterr().out)["images"][0]["scores"]


def test_a_lora_beside_a_run_is_the_one_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    assert run(["evaluate", "run", "--lora", "nowhere.safetensors"]) == 2
    assert "needs --output" in capsys.readouterr().err
    config: dict[str, Any] = {
        "model": {"base": "starter"},
        "prompts": {"train": "starter/simple_animals", "heldout": "starter/eval_simple_animals"},
        "rewards": [{"name": "jpeg_compressibility"}],
        "output": "run",
    }
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    assert run(["evaluate", "run", "--lora", "nowhere.safetensors", "--output", "other"]) == 2
    assert "nowhere.safetensors" in capsys.readouterr().err


def test_a_long_path_does_not_push_the_scores_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a_folder_with_a_very_long_name_indeed" / "and_another_one_that_is_no_shorter_at_all"
    folder.mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(folder / "red.png")
    assert run(["score", str(folder / "red.png"), "--reward", "jpeg_bytes"]) == 0
    out = capsys.readouterr().out
    assert "jpeg_bytes" in out
    assert any(line.split() and line.split()[-1].isdigit() for line in out.splitlines())
