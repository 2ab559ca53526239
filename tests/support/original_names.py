"""Denoisers in the names of their original code, which ComfyUI keeps: which weight, and which of its rows, a layer is.

Written from the maps in ComfyUI's comfy/utils.py and `model_lora_keys_unet` in its comfy/lora.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

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


_SD3 = {
    r"pos_embed\.pos_embed": "pos_embed",
    r"pos_embed\.proj\.": "x_embedder.proj.",
    r"time_text_embed\.timestep_embedder\.linear_1\.": "t_embedder.mlp.0.",
    r"time_text_embed\.timestep_embedder\.linear_2\.": "t_embedder.mlp.2.",
    r"time_text_embed\.text_embedder\.linear_1\.": "y_embedder.mlp.0.",
    r"time_text_embed\.text_embedder\.linear_2\.": "y_embedder.mlp.2.",
    r"norm_out\.linear\.": "final_layer.adaLN_modulation.1.",
    r"proj_out\.": "final_layer.linear.",
    r"transformer_blocks\.(\d+)\.norm1_context\.linear\.": r"joint_blocks.\1.context_block.adaLN_modulation.1.",
    r"transformer_blocks\.(\d+)\.attn\.norm_(q|k)\.": r"joint_blocks.\1.x_block.attn.ln_\2.",
    r"transformer_blocks\.(\d+)\.attn\.norm_added_(q|k)\.": r"joint_blocks.\1.context_block.attn.ln_\2.",
}
_FLUX = {
    r"time_text_embed\.timestep_embedder\.linear_1\.": "time_in.in_layer.",
    r"time_text_embed\.timestep_embedder\.linear_2\.": "time_in.out_layer.",
    r"time_text_embed\.text_embedder\.linear_1\.": "vector_in.in_layer.",
    r"time_text_embed\.text_embedder\.linear_2\.": "vector_in.out_layer.",
    r"time_text_embed\.guidance_embedder\.linear_1\.": "guidance_in.in_layer.",
    r"time_text_embed\.guidance_embedder\.linear_2\.": "guidance_in.out_layer.",
    r"context_embedder\.": "txt_in.",
    r"x_embedder\.": "img_in.",
    r"norm_out\.linear\.": "final_layer.adaLN_modulation.1.",
    r"proj_out\.": "final_layer.linear.",
    r"transformer_blocks\.(\d+)\.attn\.norm_q\.weight": r"double_blocks.\1.img_attn.norm.query_norm.scale",
    r"transformer_blocks\.(\d+)\.attn\.norm_k\.weight": r"double_blocks.\1.img_attn.norm.key_norm.scale",
    r"transformer_blocks\.(\d+)\.attn\.norm_added_q\.weight": r"double_blocks.\1.txt_attn.norm.query_norm.scale",
    r"transformer_blocks\.(\d+)\.attn\.norm_added_k\.weight": r"double_blocks.\1.txt_attn.norm.key_norm.scale",
    r"single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight": r"single_blocks.\1.norm.query_norm.scale",
    r"single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight": r"single_blocks.\1.norm.key_norm.scale",
}
_Z_IMAGE = {
    r"(.*)\.attention\.norm_(q|k)\.": r"\1.attention.\2_norm.",
    r"all_x_embedder\.2-1\.": "x_embedder.",
    r"all_final_layer\.2-1\.": "final_layer.",
}
"""Weights outside of the tables: diffusers' names and the original ones; the others have one name."""


def original_weights(network: Any) -> dict[str, Tensor]:
    """Return all weights of a transformer in the names of its original code."""
    table, names = {"SD3": (sd3, _SD3), "Flux": (flux, _FLUX), "ZImage": (z_image, _Z_IMAGE)}[
        type(network).__name__.removesuffix("Transformer2DModel")
    ]
    layers, joined, found = dict(table(network)), {}, {}
    last = f"transformer_blocks.{network.config.get('num_layers', 0) - 1}.norm1_context.linear."
    for name, value in network.state_dict().items():
        layer, _, end = name.rpartition(".")
        if layer in layers:
            weight, row, _ = layers[layer]
            joined.setdefault(f"{weight}.{end}", []).append((row or 0, value))
            continue
        # In the last layer, and in the last block's for the text of Stable Diffusion 3, shift and scale change places.
        if name.startswith("norm_out.linear.") or (table is sd3 and name.startswith(last)):
            value = torch.cat(value.chunk(2)[::-1])
        renamed = next((re.sub(f"^{old}", new, name) for old, new in names.items() if re.match(old, name)), name)
        found[renamed] = value
    return found | {name: torch.cat([part for _, part in sorted(parts, key=first)]) for name, parts in joined.items()}
