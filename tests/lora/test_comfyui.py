"""LoRA files in ComfyUI: every key has a weight there, and the patched weights are those of diffusers.

ComfyUI is in no package registry. The tables in tests/support/original_names.py say which weight of its models a key
of a LoRA file changes, and which rows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from alignprop_core.lora import adapters
from alignprop_core.lora.formats import read_lora
from alignprop_core.testing.pipelines import tiny_pipeline
from tests.support.original_names import Rows, flux, originals, sd3, unet, z_image


def _sd3() -> nn.Module:
    return SD3Transformer2DModel(  # type: ignore[no-any-return]
        sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        caption_projection_dim=16, pooled_projection_dim=16, dual_attention_layers=(0,),
    )  # fmt: skip


def _flux() -> nn.Module:
    return FluxTransformer2DModel(  # type: ignore[no-any-return]
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def _flux2() -> nn.Module:
    return Flux2Transformer2DModel(  # type: ignore[no-any-return]
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(2, 2, 2, 2),
    )  # fmt: skip


def _z_image() -> nn.Module:
    return ZImageTransformer2DModel(  # type: ignore[no-any-return]
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[64, 32, 32],
    )  # fmt: skip


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Iterator[tuple[str, Rows]]], list[str], str]] = {
    "sd1": (
        lambda: tiny_pipeline("stable_diffusion").unet,
        unet,
        [*ATTENTION, "conv1", "proj_in", "ff.net.2"],
        "",
    ),
    "sdxl": (lambda: tiny_pipeline("stable_diffusion_xl").unet, unet, [*ATTENTION, "conv2", "conv", "proj_in"], ""),
    "sd3": (_sd3, sd3, [*ATTENTION, "add_q_proj", "add_v_proj", "to_add_out", "ff.net.2", "norm1.linear"], "sd3"),
    "flux": (_flux, flux, [*ATTENTION, "add_k_proj", "proj_mlp", "norm.linear", "ff.net.0.proj", "ff.net.2"], "flux1"),
    "flux2": (_flux2, flux, [*ATTENTION, "to_qkv_mlp_proj", "to_add_out", "linear_in", "attn.to_out"], "flux2"),
    "z_image": (_z_image, z_image, [*ATTENTION, "feed_forward.w1", "adaLN_modulation.0"], "zimage"),
}


@pytest.mark.parametrize("model", MODELS)
def test_every_key_has_a_weight_in_comfyui_and_the_patched_weights_are_diffusers(model: str, tmp_path: Path) -> None:
    build, keys, targets, version = MODELS[model]
    torch.manual_seed(0)
    network: Any = build()
    table = dict(keys(network))
    before = originals(network, table)
    component = "unet" if isinstance(network, UNet2DConditionModel) else "transformer"
    for parameter in adapters.attach(network, rank=2, alpha=3, target_modules=targets):
        nn.init.normal_(parameter, std=0.2)
    adapters.save(network, tmp_path, name="mine", component=component)
    torch.manual_seed(0)
    plain: Any = build()
    plain.load_lora_adapter(load_file(tmp_path / "pytorch_lora_weights.safetensors"), prefix=component)
    plain.fuse_lora()
    plain.unload_lora()
    expected = originals(plain, table)

    file = load_file(tmp_path / "mine.safetensors")
    found, used = {name: weight.clone() for name, weight in before.items()}, set()
    for layer, (weight, row, rows) in table.items():
        # The names that ComfyUI looks for, and the pairs of factors that it knows.
        names = [f"lora_unet_{layer.replace('.', '_')}"] if component == "unet" else [f"transformer.{layer}"]
        for name in names:
            for up, down in (("lora_up", "lora_down"), ("lora_B", "lora_A")):
                if f"{name}.{up}.weight" not in file:
                    continue
                used |= {f"{name}.{up}.weight", f"{name}.{down}.weight", f"{name}.alpha"} & file.keys()
                b, a = file[f"{name}.{up}.weight"], file[f"{name}.{down}.weight"]
                scale = float(file[f"{name}.alpha"]) / len(a) if f"{name}.alpha" in file else 1.0
                part = found[weight] if row is None else found[weight].narrow(0, row, rows)
                part += scale * (b.flatten(1) @ a.flatten(1)).reshape(part.shape)
    assert used == file.keys()
    assert any((before[name] - expected[name]).abs().max() > 1e-2 for name in before)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-3, rtol=0)
    with safe_open(tmp_path / "mine.safetensors", "pt") as opened:
        header = opened.metadata()
    assert header.get("ss_base_model_version", "") == version
    assert header["ss_network_dim"] == "2"
    assert header["modelspec.architecture"].endswith("/lora")


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
@pytest.mark.parametrize("model", ["sd3", "flux", "flux2", "z_image"])
def test_a_file_in_the_original_names_is_read_as_diffusers_layers(model: str, prefix: str, tmp_path: Path) -> None:
    build, keys, *_ = MODELS[model]
    network = build()
    table, weights = dict(keys(network)), originals(network, dict(keys(network)))
    tensors, generator = {}, torch.Generator().manual_seed(2)
    for name, weight in weights.items():
        if "norm1" in name or "adaLN" in name:
            continue
        key = prefix + (name if prefix.endswith(".") else name.replace(".", "_"))
        tensors[f"{key}.lora_up.weight"] = torch.randn((len(weight), 2), generator=generator)
        tensors[f"{key}.lora_down.weight"] = torch.randn((2, weight.shape[1]), generator=generator)
    save_file(tensors, tmp_path / "other.safetensors")
    found = read_lora(tmp_path / "other.safetensors")["denoiser"]
    adapters.fit(found, network, tmp_path / "other.safetensors")
    for name, factors in found.items():
        weight, row, rows = table[name]
        key = prefix + (weight if prefix.endswith(".") else weight.replace(".", "_"))
        change = tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
        expected = change if row is None else change.narrow(0, row, rows)
        torch.testing.assert_close(factors.change().float(), expected)
