"""Headers of scaled and merged LoRAs, and negative numbers on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from alignprop_core.cli import run
from alignprop_core.locate import DIFFUSERS_NAME
from alignprop_core.lora.files import LoraFile, write_files
from alignprop_core.lora.formats import Factors, read_lora
from alignprop_lora.reading import read_file

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


def make(folder: Path, **header: str) -> Path:
    """Write a LoRA of one layer."""
    generator = torch.Generator().manual_seed(0)
    factors = Factors(torch.randn(2, 8, generator=generator), torch.randn(6, 2, generator=generator))
    written = {f"alignprop.{key}": value for key, value in header.items()}
    write_files(LoraFile({"denoiser": {LAYER: factors}}, header=written), folder, folder.name)
    return folder


def header(folder: Path) -> dict[str, str]:
    return dict(read_file(folder).header)


def test_strength_is_the_product_of_all_scalings(tmp_path: Path) -> None:
    made = make(tmp_path / "whole")
    for name, strength, product in (("half", "0.5", "0.5"), ("quarter", "0.5", "0.25"), ("back", "-4", "-1")):
        assert run(["lora", "scale", str(made), strength, "--output", str(tmp_path / name)]) == 0
        made = tmp_path / name
        assert header(made)["alignprop.strength"] == product
    foreign = make(tmp_path / "foreign", strength="much")
    assert run(["lora", "scale", str(foreign), "0.5", "--output", str(tmp_path / "less")]) == 0
    assert header(tmp_path / "less")["alignprop.strength"] == "much * 0.5"


def test_a_merge_keeps_the_metadata_of_each_input(tmp_path: Path) -> None:
    rewards = [json.dumps([{"name": name, "weight": 1.0}]) for name in ("aesthetic", "jpeg")]
    one = make(tmp_path / "one" / "lora", base_model="sd", rewards=rewards[0], step="10")
    two = make(tmp_path / "two" / "lora", base_model="sd", rewards=rewards[1], strength="0.5")
    assert run(["lora", "merge", str(one), str(two), "--output", str(tmp_path / "soup")]) == 0
    written = header(tmp_path / "soup")
    assert written["alignprop.base_model"] == "sd"
    assert [entry["weight"] for entry in json.loads(written["alignprop.merge"])] == [0.5, 0.5]
    inputs = json.loads(written["alignprop.inputs"])
    assert inputs[0] == {"title": "lora", "base_model": "sd", "rewards": json.loads(rewards[0]), "step": "10"}
    assert inputs[1]["rewards"] == json.loads(rewards[1])
    assert inputs[1]["strength"] == "0.5"
    other = make(tmp_path / "other", base_model="sdxl")
    assert run(["lora", "merge", str(tmp_path / "soup"), str(other), "--output", str(tmp_path / "again")]) == 0
    written = header(tmp_path / "again")
    assert "alignprop.base_model" not in written
    assert json.loads(written["alignprop.inputs"])[0]["inputs"] == inputs, "a merge of merges keeps its first inputs"


@pytest.mark.parametrize("number", ["-1", "-.5", "-2e-1"])
@pytest.mark.parametrize("place", [1, 3])
def test_a_negative_strength_needs_no_dashes(tmp_path: Path, number: str, place: int) -> None:
    made = make(tmp_path / "whole")
    words = [str(made), "--output", str(tmp_path / "less")]
    words.insert(place, number)
    assert run(["lora", "scale", *words]) == 0
    change = read_lora(made)["denoiser"][LAYER].change() * float(number)
    torch.testing.assert_close(read_lora(tmp_path / "less")["denoiser"][LAYER].change(), change, atol=1e-6, rtol=0)
    assert run(["lora", "scale", str(made), "--output", str(tmp_path / "same"), "--", number]) == 0


def test_a_misspelled_option_is_reported_as_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["lora", "scale", str(make(tmp_path / "whole")), "-1", "--outptu", str(tmp_path / "x")]) == 2
    assert "No such option: --outptu" in capsys.readouterr().err
    assert run(["lora", "scale", str(tmp_path / "whole"), "-inf", "--output", str(tmp_path / "x")]) == 2
    assert "strength must be a finite number, not -inf" in capsys.readouterr().err


def test_info_shows_rank_alpha_base_model_layers_and_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make(tmp_path / "mine", base_model="tiny")
    for file in (made / DIFFUSERS_NAME, made / "mine.safetensors", made):
        assert run(["lora", "info", str(file), "--json"]) == 0
        data = json.loads(capsys.readouterr().out)
        assert data["base_model"] == "tiny"
        assert data["layers"] == [{"component": "denoiser", "layer": LAYER, "rank": 2, "alpha": 2.0}]
        assert data["header"]["modelspec.title"] == "mine"
        assert Path(data["file"]).is_file()
    assert run(["lora", "info", str(made)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("base model tiny", "rank 2", "alpha 2", "down_blocks.*.attentions.*", "modelspec.title mine"):
        assert text in shown
    assert run(["lora", "info", str(tmp_path / "nowhere")]) == 2
    assert "no such LoRA" in capsys.readouterr().err
