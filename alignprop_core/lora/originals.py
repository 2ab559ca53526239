"""Layers of transformers' original code in LoRA files: diffusers' names of them, and of the parts of joint layers.

The original code computes queries, keys and values in one layer, FLUX.1 a part of the MLP with them; diffusers mostly
in one layer each. Names are as ComfyUI and kohya's scripts write them, with dots or underscores.
"""

from __future__ import annotations

import re

_QKV, _ADDED_QKV = "attn.to_q attn.to_k attn.to_v", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
_Z_IMAGE = {"attention.qkv": "attention.to_q attention.to_k attention.to_v", "attention.out": "attention.to_out.0"}
_BLOCKS = {
    # Stable Diffusion 3
    "joint_blocks": (
        "transformer_blocks",
        {
            "x_block.attn.qkv": _QKV,
            "x_block.attn.proj": "attn.to_out.0",
            "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
            "x_block.attn2.proj": "attn2.to_out.0",
            "x_block.mlp.fc1": "ff.net.0.proj",
            "x_block.mlp.fc2": "ff.net.2",
            "x_block.adaLN_modulation.1": "norm1.linear",
            "context_block.attn.qkv": _ADDED_QKV,
            "context_block.attn.proj": "attn.to_add_out",
            "context_block.mlp.fc1": "ff_context.net.0.proj",
            "context_block.mlp.fc2": "ff_context.net.2",
        },
    ),
    # FLUX.1 and FLUX.2: outputs : inputs decide where names are equal and layers are not
    "double_blocks": (
        "transformer_blocks",
        {
            "img_attn.qkv": _QKV,
            "img_attn.proj": "attn.to_out.0",
            "txt_attn.qkv": _ADDED_QKV,
            "txt_attn.proj": "attn.to_add_out",
            "img_mod.lin": "norm1.linear",
            "txt_mod.lin": "norm1_context.linear",
            "img_mlp.0 4:1": "ff.net.0.proj",
            "img_mlp.2 1:4": "ff.net.2",
            "txt_mlp.0 4:1": "ff_context.net.0.proj",
            "txt_mlp.2 1:4": "ff_context.net.2",
            "img_mlp.0 6:1": "ff.linear_in",
            "img_mlp.2 1:3": "ff.linear_out",
            "txt_mlp.0 6:1": "ff_context.linear_in",
            "txt_mlp.2 1:3": "ff_context.linear_out",
        },
    ),
    "single_blocks": (
        "single_transformer_blocks",
        {
            "modulation.lin": "norm.linear",
            "linear1 7:1": f"{_QKV} proj_mlp",
            "linear2 1:5": "proj_out",
            "linear1 9:1": "attn.to_qkv_mlp_proj",
            "linear2 1:4": "attn.to_out",
        },
    ),
    **{blocks: (blocks, _Z_IMAGE) for blocks in ("layers", "context_refiner", "noise_refiner")},
}
"""Original blocks -> diffusers' blocks, and original layer -> diffusers' layers in the order of its rows."""


def _plain(name: str) -> str:
    return name.replace("_", ".")


_LAYERS = {
    f"{_plain(blocks)} {_plain(layer)}": (renamed, parts.split())
    for blocks, (renamed, layers) in _BLOCKS.items()
    for layer, parts in layers.items()
}
_NAME = re.compile(rf"({'|'.join(map(_plain, _BLOCKS))})\.(\d+)\.(.+)")


def diffusers_layers(module: str, rows: int, columns: int) -> dict[str, int]:
    """Return diffusers' layers that a layer of the original code consists of, in the order of their rows.

    Args:
        module: name in the file, without a prefix such as `diffusion_model.` or `lora_unet_`.
        rows: number of the layer's outputs.
        columns: number of its inputs.

    Returns:
        name -> number of rows; the module itself if it is not such a layer.
    """
    match = _NAME.fullmatch(_plain(module))
    ratio = f"{rows // columns}:1" if rows > columns else f"1:{columns // rows}"
    key = f"{match[1]} {match[3]}" if match else ""
    found = _LAYERS.get(key) or _LAYERS.get(f"{key} {ratio}")
    if match is None or found is None:
        return {module: rows}
    blocks, parts = found
    # Queries, keys and values have one width; in FLUX.1 it is that of the input, and a part of the MLP follows them.
    width = columns if "proj_mlp" in parts else rows // len(parts)
    widths = [width] * (len(parts) - 1)
    return {f"{blocks}.{match[2]}.{part}": n for part, n in zip(parts, [*widths, rows - sum(widths)], strict=True)}
