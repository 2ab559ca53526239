"""Written files in plain diffusers: both formats load there, and change each layer as the input says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignprop_core.cli import run
from alignprop_core.locate import DIFFUSERS_NAME
from alignprop_core.lora.formats import read_lora
from alignprop_core.lora.layers import adaptable, layers_of
from alignprop_core.testing import tiny_pipeline
from alignprop_lora.fusing import fuse
from alignprop_lora.reading import read_file

UNET = re.compile(r"mid_block.*(attn1\.to_(q|out\.0)|attn2\.to_k|conv1|proj_in|ff\.net\.2)$")
ENCODER = re.compile(r"layers\.0.*(q_proj|out_proj|fc1|fc2)$")


def layers(pipeline: StableDiffusionPipeline) -> dict[str, nn.Module]:
    """Return the layers that the files of these tests change, by their names in kohya's layout."""
    found = {f"lora_unet_{name}": layer for name, layer in adaptable(pipeline.unet).items() if UNET.search(name)}
    encoder = adaptable(pipeline.text_encoder)
    return found | {f"lora_te_text_model_{name}": layer for name, layer in encoder.items() if ENCODER.search(name)}


def make(file: Path, *, ranks: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Write a file in kohya's layout with text encoder, ranks and alphas by turns; returns its weight changes."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    for number, (name, layer) in enumerate(layers(tiny_pipeline("stable_diffusion")).items()):
        assert isinstance(layer.weight, Tensor)
        shape, rank, alpha = layer.weight.shape, ranks[number % len(ranks)], (1.0, 2.0, 3.0)[number % 3]
        down = (torch.randn(rank, *shape[1:], generator=generator) * 0.2).to(dtype)
        up = (torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator) * 0.2).to(dtype)
        key = name.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
        changes[name] = (up.double().flatten(1) @ down.double().flatten(1)).reshape(shape) * (alpha / rank)
    save_file(tensors, file)
    return changes


def changes_in_diffusers(file: Path) -> dict[str, Tensor]:
    """Load a file with plain diffusers into a fresh model; returns the weight change of each layer."""
    pipeline: Any = tiny_pipeline("stable_diffusion")
    pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name="x")
    parts = {"lora_unet_": pipeline.unet, "lora_te_text_model_": pipeline.text_encoder}
    return {
        f"{prefix}{name}": layer.get_delta_weight("x").detach().double()
        for prefix, part in parts.items()
        for name, layer in layers_of(part, "x")
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, atol=tolerance * float(change.norm()), rtol=0, msg=name)


@pytest.mark.parametrize(
    "ranks",
    [pytest.param((1, 2, 4, 3), id="several ranks"), pytest.param((4,), id="one rank", marks=pytest.mark.slow)],
)
def test_both_files_change_all_layers_in_diffusers_as_the_input_does(ranks: tuple[int, ...], tmp_path: Path) -> None:
    one = make(tmp_path / "one.safetensors", ranks=ranks)
    two = make(tmp_path / "two.safetensors", ranks=ranks[::-1], seed=1)
    first, second = str(tmp_path / "one.safetensors"), str(tmp_path / "two.safetensors")
    assert run(["lora", "convert", first, "--output", str(tmp_path / "same")]) == 0
    assert run(["lora", "scale", first, "-0.5", "--output", str(tmp_path / "less")]) == 0
    merging = ["lora", "merge", first, second, "--weights", "0.7,0.6"]
    assert run([*merging, "--output", str(tmp_path / "soup")]) == 0
    expected = {
        "same": one,
        "less": {name: -0.5 * change for name, change in one.items()},
        "soup": {name: 0.7 * change + 0.6 * two[name] for name, change in one.items()},
    }
    for name, changes in expected.items():
        for file in (DIFFUSERS_NAME, f"{name}.safetensors"):
            assert_same(changes_in_diffusers(tmp_path / name / file), changes)


def test_a_written_file_has_one_rank_and_one_alpha(tmp_path: Path) -> None:
    make(tmp_path / "in.safetensors", ranks=(1, 2, 4, 3))
    assert run(["lora", "convert", str(tmp_path / "in.safetensors"), "--output", str(tmp_path / "out")]) == 0
    kohya = load_file(tmp_path / "out" / "out.safetensors")
    assert {float(tensor) for key, tensor in kohya.items() if key.endswith(".alpha")} == {4.0}
    assert {len(tensor) for key, tensor in kohya.items() if key.endswith(".lora_down.weight")} == {4}
    with safe_open(tmp_path / "out" / "out.safetensors", framework="pt") as opened:
        assert opened.metadata()["ss_network_dim"] == opened.metadata()["ss_network_alpha"] == "4"
    with safe_open(tmp_path / "out" / DIFFUSERS_NAME, framework="pt") as opened:
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert {value for key, value in settings.items() if key.endswith((".r", ".lora_alpha"))} == {4}
    assert all(value == {} for key, value in settings.items() if key.endswith("_pattern"))
    assert not any("text_model" in name for name in settings["text_encoder.target_modules"])
    assert any(
        key.startswith("text_encoder.text_model.encoder.") for key in load_file(tmp_path / "out" / DIFFUSERS_NAME)
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_small_number_formats_are_read_by_every_command(dtype: torch.dtype, tmp_path: Path) -> None:
    file = tmp_path / "in.safetensors"
    expected = make(file, ranks=(4,), dtype=dtype)
    assert run(["lora", "info", str(file)]) == 0
    assert run(["lora", "convert", str(file), "--output", str(tmp_path / "same")]) == 0
    assert run(["lora", "scale", str(file), "2", "--output", str(tmp_path / "more")]) == 0
    assert run(["lora", "merge", str(file), str(file), "--output", str(tmp_path / "soup")]) == 0
    for name, factor in (("same", 1), ("more", 2), ("soup", 1)):
        found = changes_in_diffusers(tmp_path / name / DIFFUSERS_NAME)
        assert_same(found, {layer: factor * change for layer, change in expected.items()})
    before, pipeline = layers(tiny_pipeline("stable_diffusion")), tiny_pipeline("stable_diffusion")
    fuse(pipeline, read_file(file))
    fused = {}
    for name, layer in layers(pipeline).items():
        base = before[name].weight
        assert isinstance(layer.weight, Tensor)
        assert isinstance(base, Tensor)
        fused[name] = (layer.weight.double() - base.double()).detach()
    assert_same(fused, expected, 1e-5)


def test_a_convolution_stored_as_linear_is_fused_and_merged_with_one_that_is_not(tmp_path: Path) -> None:
    name = "mid_block.attentions.0.proj_in"
    down, up = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)), torch.ones(32, 2)
    files = {"flat": (down, up), "kernel": (down[:, :, None, None], up[:, :, None, None])}
    for kind, factors in files.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors = {f"{key}.lora_down.weight": factors[0], f"{key}.lora_up.weight": factors[1]}
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / f"{kind}.safetensors")
    paths = [str(tmp_path / f"{kind}.safetensors") for kind in files]
    assert run(["lora", "merge", *paths, "--output", str(tmp_path / "soup")]) == 0
    expected = (up @ down)[:, :, None, None].double()
    found = changes_in_diffusers(tmp_path / "soup" / DIFFUSERS_NAME)
    assert_same(found, {f"lora_unet_{name}": expected})
    pipeline = tiny_pipeline("stable_diffusion")
    base = pipeline.unet.get_submodule(name).weight.clone()
    fuse(pipeline, read_file(paths[0]))
    fused = pipeline.unet.get_submodule(name).weight - base
    torch.testing.assert_close(fused.double(), expected, atol=1e-5, rtol=0)


def one_layer(file: Path, key: str, down: str = ".lora_down.weight", up: str = ".lora_up.weight") -> Path:
    save_file({f"{key}{down}": torch.ones(2, 8), f"{key}{up}": torch.ones(6, 2)}, file)
    return file


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_double_blocks_0_img_attn_norm_query_norm",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        "lycoris_transformer_blocks_0_attn_to_q",
        "diffusion_model.double_blocks.0.img_attn.norm.query_norm",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
        "base_model.model.text_model.encoder.layers.0.mlp.fc1",
        "lora_unet_down_blocks_0_motion_modules_0_proj_in",
        "lora_unet_",
    ],
)
def test_layer_names_of_other_code_are_refused_and_nothing_is_written(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = key.startswith("base_model.")
    names = (".lora_A.default.weight", ".lora_B.default.weight") if peft else (".lora_down.weight", ".lora_up.weight")
    file = one_layer(tmp_path / "in.safetensors", key, *names)
    for command in (["convert", str(file)], ["scale", str(file), "2"], ["merge", str(file), str(file)]):
        assert run(["lora", *command, "--output", str(tmp_path / "out")]) == 2
        message = capsys.readouterr().err
        assert f"{file}: " in message
        assert "is not a layer name of diffusers' models" in message
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "component"),
    [
        ("unet.conv_in", "unet"),
        ("lora_unet_mid_block_attentions_0_proj_in", "unet"),
        ("diffusion_model.middle_block.1.proj_in", "unet"),
        ("mid_block.attentions.0.proj_in", "unet"),
        ("transformer.img_in", "transformer"),
        ("lora_transformer_x_embedder", "transformer"),
        ("single_transformer_blocks.0.attn.to_q", "transformer"),
    ],
)
def test_the_denoisers_name_comes_from_the_prefix_or_the_layers(key: str, component: str, tmp_path: Path) -> None:
    file = one_layer(tmp_path / "in.safetensors", key)
    assert read_file(file).component == component
    assert run(["lora", "convert", str(file), "--to", "diffusers", "--output", str(tmp_path / "out")]) == 0
    assert all(key.startswith(f"{component}.") for key in load_file(tmp_path / "out" / DIFFUSERS_NAME))


def test_a_change_too_large_for_the_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = one_layer(tmp_path / "in.safetensors", "unet.conv_in")
    assert run(["lora", "scale", str(file), "1e300", "--output", str(tmp_path / "out")]) == 2
    assert "conv_in is too large for torch.float32" in capsys.readouterr().err


def test_a_rank_limit_is_described_and_not_reported_as_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in.safetensors", ranks=(4,))
    arguments = ["lora", "merge", str(tmp_path / "in.safetensors"), str(tmp_path / "in.safetensors")]
    assert run([*arguments, "--rank", "2", "--output", str(tmp_path / "two")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "error" not in shown
    assert re.search(r"rank limit the weight change differs from the exact merge's by \d\d\.\d\d%", shown)
    assert "no --rank is exact" in shown
    assert run([*arguments, "--rank", "4", "--output", str(tmp_path / "four")]) == 0
    assert "by 0.00%" in " ".join(capsys.readouterr().out.split())
    assert {layer.rank for layer in read_lora(tmp_path / "four")["denoiser"].values()} == {4}
