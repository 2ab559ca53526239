"""Layer names of the original U-Net, as kohya's scripts write them for SDXL, against diffusers' own converter."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from safetensors.torch import save_file
from torch import Tensor

from alignprop_core.lora.formats import read_lora
from alignprop_core.lora.layers import adaptable
from alignprop_core.lora.names import flatten_name, locate_module, unflatten_name


def original_names(unet: UNet2DConditionModel) -> dict[str, str]:
    """Return the original name of each layer of SDXL's U-Net, by diffusers' name, from the structure of its code."""
    blocks = {
        f"mid_block.{part}": f"middle_block.{n}" for n, part in enumerate(["resnets.0", "attentions.0", "resnets.1"])
    }
    for block in range(3):
        for layer in range(2):
            number = 1 + 3 * block + layer
            blocks[f"down_blocks.{block}.resnets.{layer}"] = f"input_blocks.{number}.0"
            blocks[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{number}.1"
        blocks[f"down_blocks.{block}.downsamplers.0"] = f"input_blocks.{3 * block + 3}.0"
        for layer in range(3):
            number = 3 * block + layer
            blocks[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{number}.0"
            blocks[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{number}.1"
        blocks[f"up_blocks.{block}.upsamplers.0"] = f"output_blocks.{3 * block + 2}.{2 if block < 2 else 1}"
    inside = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
    inside |= {"conv_shortcut": "skip_connection"}
    outside = {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}
    outside |= {f"time_embedding.linear_{n}": f"time_embed.{2 * n - 2}" for n in (1, 2)}
    outside |= {f"add_embedding.linear_{n}": f"label_emb.0.{2 * n - 2}" for n in (1, 2)}

    def original(name: str) -> str:
        if name in outside:
            return outside[name]
        start = next(start for start in blocks if name.startswith(f"{start}."))
        rest = name.removeprefix(f"{start}.")
        rest = "op" if ".downsamplers." in name else inside.get(rest, rest)
        return f"{blocks[start]}.{rest}"

    return {name: original(name) for name in adaptable(unet)}


@pytest.fixture(scope="module")
def sdxl() -> UNet2DConditionModel:
    """SDXL's U-Net without weights, with fewer of the equal blocks inside its transformers."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        )


def test_original_names_of_sdxl_become_those_of_diffusers_own_converter(
    sdxl: UNet2DConditionModel, tmp_path: Path
) -> None:
    originals = original_names(sdxl)
    assert len(originals) > 250
    tensors: dict[str, Tensor] = {}
    for number, original in enumerate(originals.values()):
        key = f"lora_unet_{flatten_name(original)}"
        tensors[f"{key}.lora_down.weight"] = torch.full((1, 2), float(number))  # marks the layer
        tensors[f"{key}.lora_up.weight"] = torch.ones(2, 1)
        tensors[f"{key}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "sdxl.safetensors")
    found = {
        name: int(layer.down[0, 0]) for name, layer in read_lora(tmp_path / "sdxl.safetensors")["denoiser"].items()
    }
    assert found == {name: number for number, name in enumerate(originals)}, "every layer of the model is found"

    loaded: Any = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
        tensors, unet_config=SimpleNamespace(layers_per_block=2)
    )
    plain = {key.removeprefix("unet."): tensor for key, tensor in loaded[0].items()}
    theirs = {
        key.removesuffix(".lora_A.weight"): int(tensor[0, 0])
        for key, tensor in convert_unet_state_dict_to_peft(plain).items()
        if "lora_A" in key
    }
    # Earlier versions leave layers outside the blocks with names that no layer has.
    known = {name: number for name, number in theirs.items() if name in originals}
    assert len(known) > 250
    assert known == {name: found[name] for name in known}


def test_original_names_with_dots_become_diffusers_names(sdxl: UNet2DConditionModel) -> None:
    for name, original in original_names(sdxl).items():
        assert locate_module(f"diffusion_model.{original}") == ("denoiser", name)
        assert locate_module(original) == ("denoiser", name)


@pytest.mark.parametrize(
    ("original", "name"),
    [
        ("input_blocks_1_1_proj_in", "down_blocks.0.attentions.0.proj_in"),
        ("input_blocks_10_0_in_layers_2", "down_blocks.3.resnets.0.conv1"),
        ("output_blocks_2_1_conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks_11_1_proj_out", "up_blocks.3.attentions.2.proj_out"),
    ],
)
def test_blocks_that_only_stable_diffusion_1_has(original: str, name: str) -> None:
    assert unflatten_name(original) == name


@pytest.mark.parametrize(
    "flat", ["double_blocks_0_img_attn_qkv", "down_blocks_0_motion_modules_0_proj_in", "", "_", "to__q"]
)
def test_a_flattened_name_with_unknown_words_stays_as_it_is(flat: str) -> None:
    assert unflatten_name(flat) == flat
