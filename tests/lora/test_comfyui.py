"""LoRA files in ComfyUI: every key has a weight there, and the patched weights are those of diffusers.

ComfyUI is in no package registry. The tables below say which weight of its models a key of a LoRA file changes, and
which rows of it; they were written from `model_lora_keys_unet` in its comfy/lora.py and the maps in comfy/utils.py.
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
from torch import Tensor, nn

from alignprop_core.lora import adapters
from alignprop_core.lora.formats import read_lora
from alignprop_core.testing.pipelines import tiny_pipeline

Rows = tuple[str, int | None, int]
"""A weight of ComfyUI's model, the first of its rows that a layer has (None: all), and their number."""


def parts(weight: str, layers: list[str], rows: list[int]) -> Iterator[tuple[str, Rows]]:
    for i, layer in enumerate(layers):
        yield layer, (weight, sum(rows[:i]), rows[i])


def attention(block: str, original: str, names: str, width: int) -> Iterator[tuple[str, Rows]]:
    """The joint layer of queries, keys and values."""
    yield from parts(original, [f"{block}.{name}" for name in names.split()], [width] * 3)


def sd3(network: Any) -> Iterator[tuple[str, Rows]]:
    width = network.config.num_attention_heads * network.config.attention_head_dim
    plain = {
        "attn.to_add_out": "context_block.attn.proj",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "attn.to_out.0": "x_block.attn.proj",
        "attn2.to_out.0": "x_block.attn2.proj",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
    }
    for i in range(network.config.num_layers):
        block, original = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        yield from attention(f"{block}.attn", f"{original}.x_block.attn.qkv", "to_q to_k to_v", width)
        added = "add_q_proj add_k_proj add_v_proj"
        yield from attention(f"{block}.attn", f"{original}.context_block.attn.qkv", added, width)
        yield from attention(f"{block}.attn2", f"{original}.x_block.attn2.qkv", "to_q to_k to_v", width)
        yield from ((f"{block}.{name}", (f"{original}.{there}", None, 0)) for name, there in plain.items())


def flux(network: Any) -> Iterator[tuple[str, Rows]]:
    """FLUX.1 and FLUX.2."""
    width = network.config.num_attention_heads * network.config.attention_head_dim
    double = {
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
        "ff.linear_in": "img_mlp.0",
        "ff.linear_out": "img_mlp.2",
        "ff_context.linear_in": "txt_mlp.0",
        "ff_context.linear_out": "txt_mlp.2",
    }
    single = {
        "norm.linear": "modulation.lin",
        "proj_out": "linear2",
        "attn.to_qkv_mlp_proj": "linear1",
        "attn.to_out": "linear2",
    }
    for i in range(network.config.num_layers):
        block, original = f"transformer_blocks.{i}", f"double_blocks.{i}"
        yield from attention(f"{block}.attn", f"{original}.img_attn.qkv", "to_q to_k to_v", width)
        yield from attention(f"{block}.attn", f"{original}.txt_attn.qkv", "add_q_proj add_k_proj add_v_proj", width)
        yield from ((f"{block}.{name}", (f"{original}.{there}", None, 0)) for name, there in double.items())
    for i in range(network.config.num_single_layers):
        block, original = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        joint = [f"{block}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
        yield from parts(f"{original}.linear1", joint, [width, width, width, 4 * width])
        yield from ((f"{block}.{name}", (f"{original}.{there}", None, 0)) for name, there in single.items())


def z_image(network: Any) -> Iterator[tuple[str, Rows]]:
    plain = ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0"]
    refiners = network.config.n_refiner_layers
    for blocks, n in {
        "layers": network.config.n_layers,
        "context_refiner": refiners,
        "noise_refiner": refiners,
    }.items():
        for i in range(n):
            block = f"{blocks}.{i}.attention"
            yield from attention(block, f"{block}.qkv", "to_q to_k to_v", network.config.dim)
            yield f"{block}.to_out.0", (f"{block}.out", None, 0)
            yield from ((f"{blocks}.{i}.{name}", (f"{blocks}.{i}.{name}", None, 0)) for name in plain)


def unet(network: Any) -> Iterator[tuple[str, Rows]]:
    """Stable Diffusion's UNet, whose original code numbers the layers of all its blocks in a row."""
    inside = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
    inside |= {"conv_shortcut": "skip_connection"}
    layers = network.config.layers_per_block
    for name, module in network.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        blocks, *rest = name.split(".")
        if blocks == "mid_block":
            place = f"middle_block.{ {'attentions': 1}.get(rest[0], 2 * int(rest[1])) }"
        elif blocks == "down_blocks":
            number = 1 + int(rest[0]) * (layers + 1) + (layers if rest[1] == "downsamplers" else int(rest[2]))
            place = f"input_blocks.{number}.{int(rest[1] == 'attentions')}"
        elif blocks == "up_blocks":
            number = int(rest[0]) * (layers + 1) + (layers if rest[1] == "upsamplers" else int(rest[2]))
            crossed = hasattr(network.up_blocks[int(rest[0])], "attentions")
            place = f"output_blocks.{number}.{ {'resnets': 0, 'attentions': 1}.get(rest[1], 1 + crossed) }"
        else:
            continue
        kind, layer = (rest[0], rest[2:]) if blocks == "mid_block" else (rest[1], rest[3:])
        end = ".".join(layer)
        end = inside.get(end, end) if kind == "resnets" else "op" if kind == "downsamplers" else end
        yield name, (f"{place}.{end}", None, 0)


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


def first(part: tuple[int, Tensor]) -> int:
    return part[0]


def originals(network: nn.Module, table: dict[str, Rows]) -> dict[str, Tensor]:
    """ComfyUI's weights: those of diffusers, joined where it has one layer."""
    weights: dict[str, list[tuple[int, Tensor]]] = {}
    modules = dict(network.named_modules())
    for name, (weight, row, _) in table.items():
        if name in modules:
            weights.setdefault(weight, []).append((row or 0, modules[name].weight.detach()))  # type: ignore[arg-type]
    return {
        weight: torch.cat([part for _, part in sorted(found, key=lambda f: f[0])]) for weight, found in weights.items()
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
