"""LoRA files of many programs and odd ones: read with the right weight change, or refused with the file and the key."""

from __future__ import annotations

import io
import json
import math
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save, save_file
from torch import Tensor

from alignprop_core.errors import LoraError
from alignprop_core.lora import adapters as lora
from alignprop_core.lora.formats import read_lora
from alignprop_core.lora.layers import layers_of
from alignprop_core.lora.swapping import detach
from tests.support.tiny import tiny_sd

BLOCK = "mid_block.attentions.0.transformer_blocks.0"
LINEAR, OUT = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_out.0"
POINTWISE, CONV = "mid_block.attentions.0.proj_in", "mid_block.resnets.0.conv1"
WORDS = "text_model.encoder.layers.0.self_attn.q_proj"
KOHYA = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
PEFT = f"base_model.model.{LINEAR}"
RANK, WIDTH = 4, 32


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + math.prod(shape)))


DOWN, UP = random(RANK, WIDTH), random(WIDTH, RANK, seed=1)
PRODUCT = UP.double() @ DOWN.double()
FILTER, ONE = random(RANK, WIDTH, 3, 3), UP[:, :, None, None]
FILTERED = torch.einsum("or,rikl->oikl", UP.double(), FILTER.double())
OLD = {f"{BLOCK}.attn1.processor.to_q_lora": LINEAR, f"{BLOCK}.attn1.processor.to_out_lora": OUT}
CONFIG = {"adapter_config.json": {"r": RANK, "lora_alpha": 8, "peft_type": "LORA", "use_rslora": False}}


def kohya(name: str = KOHYA, *, down: Tensor = DOWN, up: Tensor = UP, **others: Tensor) -> dict[str, Tensor]:
    factors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    return factors | {f"{name}.{key}": tensor for key, tensor in others.items()}


def pair(name: str, down: str, up: str) -> dict[str, Tensor]:
    return {f"{name}{down}": DOWN, f"{name}{up}": UP}


def cast(dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    down, up = DOWN.to(dtype), UP.to(dtype)
    return kohya(down=down, up=up), {LINEAR: up.double() @ down.double()}


PEFT_PAIR, NAMED = ("lora_A.weight", "lora_B.weight"), (".lora_A.default.weight", ".lora_B.default.weight")
SETTINGS = {"text_encoder.lora_alpha": 4, "text_encoder.alpha_pattern": {r"^encoder\.layers\.0\.self_attn\.q_proj": 12}}

READ: dict[str, tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]] = {
    "peft": (pair(PEFT, *("." + p for p in PEFT_PAIR)), {LINEAR: 2 * PRODUCT}, CONFIG),
    "peft with the adapter's name": (pair(PEFT, *NAMED), {LINEAR: 2 * PRODUCT}, CONFIG),
    "peft with the adapter's name, no config": (pair(PEFT, *NAMED), {LINEAR: PRODUCT}, {}),
    "a network's own state": (pair(LINEAR, *NAMED), {LINEAR: PRODUCT}, {}),
    "diffusers' first attention processors": (
        {key: tensor for name in OLD for key, tensor in pair(name, ".down.weight", ".up.weight").items()},
        dict.fromkeys(OLD.values(), PRODUCT),
        {},
    ),
    "attention processors of a pipeline": (
        {f"unet.{key}": t for name in OLD for key, t in pair(name, ".down.weight", ".up.weight").items()},
        dict.fromkeys(OLD.values(), PRODUCT),
        {},
    ),
    "diffusers before peft": (
        pair(f"unet.{LINEAR}.lora", ".down.weight", ".up.weight")
        | pair(f"text_encoder.{WORDS}.lora_linear_layer", ".down.weight", ".up.weight"),
        {LINEAR: PRODUCT, WORDS: PRODUCT},
        {},
    ),
    "text encoder before peft": (
        pair(f"text_encoder.{WORDS.replace('q_proj', 'to_q_lora')}", ".down.weight", ".up.weight"),
        {WORDS: PRODUCT},
        {},
    ),
    "text encoder by transformers 5": (
        pair(f"text_encoder.{WORDS.removeprefix('text_model.')}", ".lora_A.weight", ".lora_B.weight"),
        {WORDS: 3 * PRODUCT},
        {"header": SETTINGS},
    ),
    "kohya with alpha": (kohya(alpha=torch.tensor(2.0)), {LINEAR: 0.5 * PRODUCT}, {}),
    "kohya without alpha": (kohya(), {LINEAR: PRODUCT}, {}),
    "kohya with alpha 0, which means none": (kohya(alpha=torch.tensor(0.0)), {LINEAR: PRODUCT}, {}),
    "kohya with a whole number as alpha": (kohya(alpha=torch.tensor(8)), {LINEAR: 2 * PRODUCT}, {}),
    "kohya, one text encoder": (kohya("lora_te_" + WORDS.replace(".", "_")), {WORDS: PRODUCT}, {}),
    "kohya, first of two text encoders": (kohya("lora_te1_" + WORDS.replace(".", "_")), {WORDS: PRODUCT}, {}),
    "kohya, original layer names": (
        kohya("lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"),
        {LINEAR: PRODUCT},
        {},
    ),
    "ComfyUI, original layer names": (
        pair("diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q", ".lora_A.weight", ".lora_B.weight"),
        {LINEAR: PRODUCT},
        {},
    ),
    "a convolution": (kohya("lora_unet_" + CONV.replace(".", "_"), down=FILTER, up=ONE), {CONV: FILTERED}, {}),
    "a convolution with a flat kernel": (
        kohya("lora_unet_" + CONV.replace(".", "_"), down=FILTER.flatten(1), up=UP),
        {CONV: FILTERED},
        {},
    ),
    "a convolution with one flat factor": (
        kohya("lora_unet_" + CONV.replace(".", "_"), down=FILTER, up=UP),
        {CONV: FILTERED},
        {},
    ),
    "a 1x1 convolution as linear": (
        kohya("lora_unet_" + POINTWISE.replace(".", "_")),
        {POINTWISE: PRODUCT[:, :, None, None]},
        {},
    ),
    "a linear layer as 1x1 convolution": (kohya(down=DOWN[:, :, None, None], up=ONE), {LINEAR: PRODUCT}, {}),
    "float16": (*cast(torch.float16), {}),
    "bfloat16": (*cast(torch.bfloat16), {}),
    "float64": (*cast(torch.float64), {}),
    "float8_e4m3fn": (*cast(torch.float8_e4m3fn), {}),
    "float8_e5m2": (*cast(torch.float8_e5m2), {}),
    "float8 with float8 alpha": (
        cast(torch.float8_e4m3fn)[0] | {f"{KOHYA}.alpha": torch.tensor(2.0).to(torch.float8_e4m3fn)},
        {LINEAR: 0.5 * cast(torch.float8_e4m3fn)[1][LINEAR]},
        {},
    ),
}


@pytest.fixture(scope="module")
def model() -> StableDiffusionPipeline:
    return tiny_sd()


@pytest.fixture
def pipeline(model: StableDiffusionPipeline) -> Iterator[StableDiffusionPipeline]:
    """A tiny pipeline for all tests of this module; adapters are removed after each."""
    yield model
    for part in (model.unet, model.text_encoder):
        detach(part, "x")
        assert not layers_of(part, "x")


def write(folder: Path, tensors: Mapping[str, Tensor], extra: Mapping[str, Any] | None = None) -> Path:
    """Write a file with a header's settings (`header`), and further JSON files beside it."""
    extra = dict(extra or {})
    settings = extra.pop("header", None)
    packed = settings if isinstance(settings, str) else json.dumps(settings)
    file = folder / "odd.safetensors"
    copies = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
    save_file(copies, file, metadata=None if settings is None else {"lora_adapter_metadata": packed})
    for name, data in extra.items():
        (folder / name).write_text(data if isinstance(data, str) else json.dumps(data))
    return file


@pytest.mark.parametrize("kind", READ)
def test_files_of_many_programs_change_the_weights_as_their_numbers_say(
    kind: str, pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    tensors, expected, extra = READ[kind]
    lora.attach_frozen(pipeline, write(tmp_path, tensors, extra), 1.0, "x")
    found = {}
    for part, prefix in ((pipeline.unet, ""), (pipeline.text_encoder, "text_model.")):
        for name, layer in layers_of(part, "x"):
            found[f"{prefix}{name}"] = layer.get_delta_weight("x").double()
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        assert found[name].shape == change.shape, name
        torch.testing.assert_close(found[name], change, atol=1e-4, rtol=1e-6)


def test_a_file_in_eight_bits_continues_training(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    tensors, expected = cast(torch.float8_e4m3fn)
    unet = tiny_sd().unet
    lora.attach(unet, rank=RANK, init_from=write(tmp_path, tensors), target_modules=[LINEAR])
    torch.testing.assert_close(lora.current(unet)[LINEAR].change(), expected[LINEAR], atol=1e-5, rtol=0)


def test_ranks_that_a_file_has_filled_up_with_zeros_are_trained(tmp_path: Path) -> None:
    padded = kohya(down=torch.cat([DOWN, torch.zeros(2, WIDTH)]), up=torch.cat([UP, torch.zeros(WIDTH, 2)], 1))
    unet = tiny_sd().unet
    lora.attach(unet, rank=RANK + 2, init_from=write(tmp_path, padded), target_modules=[LINEAR])
    torch.testing.assert_close(lora.current(unet)[LINEAR].change(), PRODUCT, atol=1e-5, rtol=0)
    words = torch.randn(1, 7, WIDTH, generator=torch.Generator().manual_seed(0))
    unet(torch.ones(1, 4, 4, 4), 10, words).sample.square().sum().backward()
    _, up = lora.parameters(unet)
    assert up.grad is not None
    assert (up.grad.abs().amax(0) > 0).all(), "A and B both zero would stay zero"


# --- refused ---------------------------------------------------------------------------------------------------------

HALF = kohya()
BROKEN = f"unet.{LINEAR}"
WITH_A_B = pair(BROKEN, ".lora_A.weight", ".lora_B.weight")

REFUSED: dict[str, tuple[dict[str, Tensor], str, dict[str, Any]]] = {
    "DoRA by kohya": (kohya(dora_scale=torch.ones(WIDTH, 1)), f"{KOHYA}.dora_scale of a DoRA", {}),
    "DoRA by peft": (
        {**pair(PEFT, ".lora_A.weight", ".lora_B.weight"), f"{PEFT}.lora_magnitude_vector": torch.ones(WIDTH)},
        f"{PEFT}.lora_magnitude_vector of a DoRA",
        CONFIG,
    ),
    "LoHa": ({f"{KOHYA}.hada_w1_a": UP, f"{KOHYA}.hada_w1_b": DOWN}, f"{KOHYA}.hada_w1_a of a LoHa", {}),
    "LoKr": ({f"{KOHYA}.lokr_w1": UP, f"{KOHYA}.lokr_w2": DOWN}, f"{KOHYA}.lokr_w1 of a LoKr", {}),
    "IA3": (
        {f"{KOHYA}.weight": UP, f"{KOHYA}.on_input": torch.tensor(True)},
        f"{KOHYA}.on_input of an IA3 adapter",
        {},
    ),
    "core tensors": (kohya(**{"lora_mid.weight": random(RANK, RANK, 3, 3)}), f"{KOHYA}.lora_mid.weight of", {}),
    "biases": ({**WITH_A_B, f"{BROKEN}.lora_B.bias": torch.ones(WIDTH)}, f"{BROKEN}.lora_B.bias", {}),
    "other weights beside the LoRA": (
        {**WITH_A_B, "unet.conv_in.weight": torch.ones(2, 2)},
        "unet.conv_in.weight",
        {},
    ),
    "no second factor": ({f"{KOHYA}.lora_down.weight": DOWN}, f"{KOHYA}.lora_down.weight: its layer has one", {}),
    "no first factor": ({f"{KOHYA}.lora_up.weight": UP}, f"{KOHYA}.lora_up.weight: its layer has one", {}),
    "alpha of no layer": (
        {**kohya(), "lora_unet_conv_in.alpha": torch.tensor(1.0)},
        "lora_unet_conv_in.alpha: its layer has one",
        {},
    ),
    "rank 0": (kohya(down=torch.ones(0, WIDTH), up=torch.ones(WIDTH, 0)), f"{KOHYA}.lora_down.weight is (0, 32)", {}),
    "no outputs": (kohya(up=torch.ones(0, RANK)), f"{KOHYA}.lora_up.weight is (0, 4)", {}),
    "factors of other ranks": (kohya(up=torch.ones(WIDTH, 3)), f"{KOHYA}.lora_up.weight is (32, 3)", {}),
    "one dimension": (kohya(down=torch.ones(WIDTH)), f"{KOHYA}.lora_down.weight is (32,)", {}),
    "a kernel in the second factor": (
        kohya(up=torch.ones(WIDTH, RANK, 3, 3)),
        f"{KOHYA}.lora_up.weight is (32, 4, 3, 3)",
        {},
    ),
    "several alphas": (kohya(alpha=torch.ones(2)), f"{KOHYA}.alpha is (2,)", {}),
    "no tensors": ({}, "no LoRA keys", {}),
    "alpha alone": ({f"{KOHYA}.alpha": torch.tensor(1.0)}, "no LoRA keys", {}),
    "whole numbers": (kohya(down=torch.ones(RANK, WIDTH, dtype=torch.int8)), "lora_down.weight is torch.int8", {}),
    "complex numbers": (kohya(alpha=torch.ones(1, dtype=torch.complex64)), "alpha is torch.complex64", {}),
    "four bits": (
        kohya(down=torch.ones(RANK, WIDTH, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)),
        "lora_down.weight is torch.float4",
        {},
    ),
    "NaN": (kohya(up=torch.full_like(UP, math.nan)), f"{KOHYA}.lora_up.weight contains NaN", {}),
    "NaN in eight bits": (
        kohya(up=torch.full_like(UP, math.nan).to(torch.float8_e5m2)),
        f"{KOHYA}.lora_up.weight contains NaN",
        {},
    ),
    "infinite alpha": (kohya(alpha=torch.tensor(math.inf)), f"{KOHYA}.alpha contains NaN", {}),
    "textual inversion by A1111": ({"emb_params": UP}, "emb_params of a textual inversion", {}),
    "textual inversion for SDXL": ({"clip_l": UP, "clip_g": UP}, "clip_g of a textual inversion", {}),
    "a complete checkpoint": (
        {"model.diffusion_model.input_blocks.0.0.weight": UP, "first_stage_model.decoder.conv_in.weight": UP},
        "of a complete checkpoint",
        {},
    ),
    "a complete denoiser": ({"down_blocks.0.resnets.0.conv1.weight": UP}, "of a complete denoiser", {}),
    "one layer in two layouts": ({**kohya(), **WITH_A_B}, f"{BROKEN}.lora_A.weight are of one layer", {}),
    "two adapters": (
        pair(LINEAR, *NAMED) | pair(LINEAR, ".lora_A.second.weight", ".lora_B.second.weight"),
        f"{LINEAR}.lora_A.second.weight are of one layer",
        {},
    ),
    "another base model": (kohya(down=torch.ones(RANK, 40)), f"{LINEAR} changes weights of shape (32, 40)", {}),
    "a layer that the model lacks": (
        kohya(KOHYA.replace("attn1", "attn9")),
        "mid_block_attentions_0_transformer_blocks_0_attn9_to_q, which this UNet2DConditionModel does not have",
        {},
    ),
    "a text encoder that the model lacks": (
        kohya("lora_te2_" + WORDS.replace(".", "_")),
        "text_encoder_2, which this model does not have",
        {},
    ),
    "FLUX by kohya": (kohya("lora_unet_double_blocks_0_img_attn_qkv"), "transformer_blocks.0.attn.to_q", {}),
    "a header that is not JSON": (WITH_A_B, "lora_adapter_metadata in its header", {"header": "{"}),
    "a header that is a list": (WITH_A_B, "lora_adapter_metadata in its header", {"header": [1]}),
    "a nested header": (WITH_A_B, "lora_adapter_metadata in its header", {"header": "[" * 100_000}),
    "alpha that is no number": (WITH_A_B, "its scale is unknown", {"header": {"unet.lora_alpha": "much"}}),
    "alpha without end": (WITH_A_B, "its scale is unknown", {"header": '{"unet.lora_alpha": 1e999}'}),
    "a huge alpha": (WITH_A_B, "its scale is unknown", {"header": {"unet.lora_alpha": 10**400}}),
    "patterns that are none": (
        WITH_A_B,
        "its scale is unknown",
        {"header": {"unet.lora_alpha": 4, "unet.alpha_pattern": {"(": 2}}},
    ),
    "peft without its config": (pair(PEFT, ".lora_A.weight", ".lora_B.weight"), "its adapter_config.json", {}),
    "peft with a broken config": (
        pair(PEFT, ".lora_A.weight", ".lora_B.weight"),
        "its adapter_config.json",
        {"adapter_config.json": "[1]"},
    ),
    "PiSSA": (
        pair(PEFT, ".lora_A.weight", ".lora_B.weight"),
        "init_lora_weights is pissa_niter_16: the adapter was trained on base weights that were changed first",
        {"adapter_config.json": CONFIG["adapter_config.json"] | {"init_lora_weights": "pissa_niter_16"}},
    ),
    "OLoRA in diffusers' header": (
        WITH_A_B,
        "unet.init_lora_weights is olora",
        {"header": {"unet.lora_alpha": 4, "unet.init_lora_weights": "olora"}},
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_a_plain_lora_for_the_model_is_refused_with_file_and_key(
    kind: str, pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    tensors, words, extra = REFUSED[kind]
    file = write(tmp_path, tensors, extra)
    with pytest.raises(LoraError) as caught:
        lora.attach_frozen(pipeline, file, 1.0, "x")
    message = str(caught.value)
    assert message.startswith(str(file)) or f" {file}" in message
    assert words in message
    assert "\n" not in message
    assert not layers_of(pipeline.unet, "x"), "the model is unchanged"


def zipped() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a.lora_down.weight": DOWN}, buffer)
    return buffer.getvalue()


COMPLETE = save(kohya())
BYTES = {
    "an empty file": b"",
    "a truncated file": COMPLETE[: len(COMPLETE) // 2],
    "a truncated header": COMPLETE[:40],
    "a pickle": pickle.dumps({"a.lora_down.weight": [1.0]}),
    "a file by torch.save": zipped(),
    "a text": b"<!DOCTYPE html><html><body>404: not found</body></html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("kind", BYTES)
def test_a_file_that_is_not_safetensors_is_refused_by_its_content(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "odd.safetensors"
    file.write_bytes(BYTES[kind])
    with pytest.raises(LoraError, match=r"is not a complete safetensors file|is a pickled file") as caught:
        read_lora(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
