"""LoRAs scaled, merged, converted and fused exactly, and one message for each mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from alignprop_core.cli import run
from alignprop_core.errors import LoraError
from alignprop_core.locate import DIFFUSERS_NAME
from alignprop_core.lora import adapters as lora
from alignprop_core.lora.files import LoraFile
from alignprop_core.lora.formats import Factors, read_lora, write_kohya
from alignprop_core.testing import tiny_pipeline
from alignprop_lora.fusing import fuse
from alignprop_lora.merging import merge, scale, truncated
from alignprop_lora.reading import read_file


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny pipeline, as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("tiny_model")
    tiny_pipeline("stable_diffusion").save_pretrained(folder)
    return folder


def make_lora(
    folder: Path, *, rank: int = 4, seed: int = 5, target_modules: list[str] | None = None, **options: Any
) -> Path:
    """Write a LoRA of the tiny model with a random change."""
    unet = tiny_pipeline("stable_diffusion").unet
    lora.attach(unet, rank=rank, target_modules=target_modules, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora.parameters(unet)[1::2]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    lora.save(unet, folder, name=folder.name, metadata={"alignprop.base_model": "tiny"})
    return folder


def changes(path: Path) -> dict[str, Tensor]:
    return {name: factors.change() for name, factors in read_lora(path)["denoiser"].items()}


def both(folder: Path) -> list[dict[str, Tensor]]:
    """The weight changes of a folder's two files."""
    return [changes(folder / DIFFUSERS_NAME), changes(folder / f"{folder.name}.safetensors")]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, atol=tolerance * float(change.norm() + 1e-9), rtol=0)


def generate(pipe: StableDiffusionPipeline) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    images: Tensor = pipe("a fox", num_inference_steps=2, generator=generator, output_type="pt").images
    return images


# -- files ------------------------------------------------------------------------------------------------------------


def test_scale_writes_both_formats(tmp_path: Path) -> None:
    one = make_lora(tmp_path / "one", alpha=11.0)
    assert run(["lora", "scale", str(one), "0.4", "--output", str(tmp_path / "weak")]) == 0
    expected = {name: 0.4 * change for name, change in changes(one).items()}
    for found in both(tmp_path / "weak"):
        assert_same(found, expected)


def test_merge_is_exact_in_weight_changes_and_not_in_factors(tmp_path: Path) -> None:
    one = make_lora(tmp_path / "one", rank=4, alpha=11.0)
    two = make_lora(tmp_path / "two", rank=3, seed=6, target_modules=["to_q", "conv1"], use_rslora=True)
    arguments = ["lora", "merge", str(one), str(two / "two.safetensors"), "--weights", "0.7,-1.5"]
    assert run([*arguments, "--output", str(tmp_path / "soup")]) == 0
    first, second = changes(one), changes(two)
    assert first.keys() != second.keys()
    expected = {
        name: 0.7 * first.get(name, torch.zeros(())) - 1.5 * second.get(name, torch.zeros(()))
        for name in first.keys() | second.keys()
    }
    for found in both(tmp_path / "soup"):
        assert_same(found, expected)
    ranks = {factors.rank for factors in read_lora(tmp_path / "soup")["denoiser"].values()}
    assert ranks == {7}, "ranks add up where both change a layer, and all layers have the largest"
    header = read_file(tmp_path / "soup").header["alignprop.merge"]
    assert json.loads(header) == [{"lora": "one", "weight": 0.7}, {"lora": "two.safetensors", "weight": -1.5}]


def test_merge_to_a_rank_is_the_best_approximation_and_reports_its_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [make_lora(tmp_path / name, seed=seed) for name, seed in (("one", 1), ("two", 2))]
    read = [read_file(path) for path in paths]
    exact = merge(read, [0.5, 0.5]).lora.denoiser
    for rank in (1, 3, 8):
        merged = merge(read, [0.5, 0.5], rank=rank)
        lost, whole = 0.0, 0.0
        for name, factors in merged.lora.denoiser.items():
            u, sizes, v = torch.linalg.svd(exact[name].change(), full_matrices=False)
            nearest = (u[:, :rank] * sizes[:rank]) @ v[:rank]
            torch.testing.assert_close(factors.change(), nearest, atol=1e-9, rtol=0)
            assert factors.rank == min(rank, 8)
            lost += float((nearest - exact[name].change()).square().sum())
            whole += float(exact[name].change().square().sum())
        assert merged.error == pytest.approx((lost / whole) ** 0.5, abs=1e-9)
        assert merged.max_error >= merged.error
    assert merged.error < 1e-9, "rank 8 is enough for two LoRAs of rank 4"
    assert run(["lora", "merge", *map(str, paths), "--rank", "3", "--output", str(tmp_path / "soup")]) == 0
    assert "differs from the exact merge's by" in " ".join(capsys.readouterr().out.split())


def test_truncation_handles_convolutions_and_zero_changes() -> None:
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(6, 4, 3, 3, generator=generator), torch.randn(5, 6, 1, 1, generator=generator)
    layer, sizes = truncated(Factors(down, up, 0.5), 5)
    torch.testing.assert_close(layer.change(), Factors(down, up, 0.5).change(), atol=1e-9, rtol=0)
    assert layer.down.shape[1:] == (4, 3, 3)
    assert layer.up.shape[2:] == (1, 1)
    assert len(sizes) == 5
    zero, _ = truncated(Factors(down, torch.zeros_like(up)), 5)
    assert not zero.change().any()
    assert zero.rank == 1


def test_sweep_writes_one_merge_per_share(tmp_path: Path) -> None:
    one, two = make_lora(tmp_path / "one", seed=1), make_lora(tmp_path / "two", seed=2)
    assert run(["lora", "merge", str(one), str(two), "--sweep", "0,0.25,1", "--output", str(tmp_path / "soups")]) == 0
    first, second = changes(one), changes(two)
    for share in (0.0, 0.25, 1.0):
        expected = {name: (1 - share) * first[name] + share * second[name] for name in first}
        folder = tmp_path / "soups" / f"{share:g}"
        assert_same(changes(folder / DIFFUSERS_NAME), expected)
        assert_same(changes(folder / f"soups-{share:g}.safetensors"), expected)


def test_convert_keeps_text_encoders_and_headers(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def factors(name: str) -> dict[str, Factors]:
        return {name: Factors(torch.randn(2, 8, generator=generator), torch.randn(6, 2, generator=generator), 0.5)}

    unet = factors("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k")
    encoders = {"text_encoder": factors("text_model.encoder.layers.0.self_attn.q_proj")}
    encoders["text_encoder_2"] = factors("text_model.encoder.layers.1.self_attn.v_proj")
    write_kohya(tmp_path / "in.safetensors", {"unet": unet, **encoders}, metadata={"modelspec.title": "mine"})
    assert run(["lora", "convert", str(tmp_path / "in.safetensors"), "--output", str(tmp_path / "out")]) == 0
    expected = {"denoiser": unet, **encoders}
    for file in (DIFFUSERS_NAME, "out.safetensors"):
        found = read_lora(tmp_path / "out" / file)
        assert found.keys() == expected.keys()
        for component, part in expected.items():
            assert_same({n: f.change() for n, f in found[component].items()}, {n: f.change() for n, f in part.items()})
    arguments = ["lora", "convert", str(tmp_path / "in.safetensors"), "--to", "kohya", "--name", "other"]
    assert run([*arguments, "--output", str(tmp_path / "kohya")]) == 0
    assert [path.name for path in (tmp_path / "kohya").iterdir()] == ["other.safetensors"]
    alone = LoraFile(expected)
    assert scale(alone, 0.0).parts["text_encoder"].keys() == encoders["text_encoder"].keys()


def test_a_fused_model_generates_the_same_images_as_the_lora(tiny_model: Path, tmp_path: Path) -> None:
    one = make_lora(tmp_path / "one", target_modules=["to_q", "to_k", "conv1"])
    arguments = ["lora", "fuse", str(one), "--model", str(tiny_model), "--strength", "0.8"]
    assert run([*arguments, "--output", str(tmp_path / "fused")]) == 0
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model)
    base = generate(pipe)
    pipe.load_lora_weights(one, weight_name=DIFFUSERS_NAME)
    pipe.set_adapters(pipe.get_active_adapters(), 0.8)
    expected = generate(pipe)
    assert (expected - base).abs().max() > 1e-3
    torch.testing.assert_close(
        generate(StableDiffusionPipeline.from_pretrained(tmp_path / "fused")), expected, atol=1e-5, rtol=0
    )
    assert not list(tmp_path.glob(".*tmp"))


def test_fusing_into_half_precision_reports_the_rounding_error(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make_lora(tmp_path / "one")
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model)
    exact, rough = fuse(pipe, read_file(one), 1e-3), None
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model)
    rough = fuse(pipe, read_file(one), 1e-3, dtype=torch.bfloat16)
    assert exact.rounding_error < 1e-3
    assert rough.rounding_error > 0.5, "a change of a thousandth is mostly lost in bfloat16"
    assert next(pipe.unet.parameters()).dtype == torch.bfloat16
    arguments = ["lora", "fuse", str(one), "--model", str(tiny_model), "--precision", "bf16"]
    assert run([*arguments, "--output", str(tmp_path / "fused")]) == 0
    assert "bf16 differs from the exact weight change by" in capsys.readouterr().out


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["scale", "ONE", "nan", "--output", "OUT"], "strength must be a finite number, not nan"),
        (["scale", "gone", "1", "--output", "OUT"], "no such LoRA"),
        (["merge", "ONE", "--weights", "0.5,0.5", "--output", "OUT"], "1 LoRAs and 2 weights"),
        (["merge", "ONE", "ONE", "--weights", "0,0", "--output", "OUT"], "not all 0"),
        (["merge", "ONE", "ONE", "--weights", "a,b", "--output", "OUT"], "separated by commas"),
        (["merge", "ONE", "OTHER", "--output", "OUT"], "has weights of shapes"),
        (["merge", "ONE", "ONE", "--sweep", "0,1", "--weights", "1,1", "--output", "OUT"], "no --weights"),
        (["convert", "ONE", "--to", "ckpt", "--output", "OUT"], "choose diffusers, kohya or both"),
        (["convert", "ONE", "--name", "../x", "--output", "OUT"], "plain name"),
        (["fuse", "ONE", "--model", "MODEL", "--precision", "fp8", "--output", "OUT"], "fp32, fp16 or bf16"),
        (["fuse", "ONE", "--model", "MODEL", "--output", "MODEL"], "not empty"),
        (["fuse", "OTHER", "--model", "MODEL", "--output", "OUT"], "does not fit this model"),
    ],
)
def test_lora_mistakes_have_one_message(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    one = make_lora(tmp_path / "one")
    name = next(iter(read_lora(one)["denoiser"]))
    odd = {name: Factors(torch.ones(2, 10), torch.ones(10, 2))}
    write_kohya(tmp_path / "other.safetensors", {"unet": odd})
    places = {"ONE": one, "OTHER": tmp_path / "other.safetensors", "OUT": tmp_path / "out", "MODEL": tiny_model}
    assert run(["lora", *(str(places.get(argument, argument)) for argument in arguments)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    assert words in message
    assert not (tmp_path / "out").exists()


def test_a_unet_lora_and_a_transformer_lora_cannot_be_merged() -> None:
    part = {"denoiser": {"a": Factors(torch.ones(1, 2), torch.ones(2, 1))}}
    with pytest.raises(LoraError, match="different kinds of model"):
        merge([LoraFile(part), LoraFile(part, "transformer")], [1, 1])
    with pytest.raises(LoraError, match="at least 1"):
        merge([LoraFile(part)], [1], rank=0)
