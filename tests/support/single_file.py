"""A Stable Diffusion pipeline in the names of the original code: what a single .safetensors file of it holds."""

from __future__ import annotations

import re
from typing import Any

import torch

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def single_file_weights(pipeline: Any) -> dict[str, torch.Tensor]:
    """Return a pipeline's weights as the original training code of Stable Diffusion 1 named them."""
    encoder = pipeline.text_encoder.state_dict()
    found = {f"cond_stage_model.transformer.text_model.{name}": value for name, value in encoder.items()}
    found |= {f"model.diffusion_model.{name}": value for name, value in unet_weights(pipeline.unet).items()}
    found |= {f"first_stage_model.{name}": value for name, value in vae_weights(pipeline.vae).items()}
    return {name: value.contiguous() for name, value in found.items()}


def unet_weights(unet: Any) -> dict[str, torch.Tensor]:
    """Return a UNet's weights in the original names, without prefix."""
    layers = unet.config.layers_per_block
    crossed = [hasattr(block, "attentions") for block in unet.up_blocks]
    return {_unet_name(name, layers, crossed): value for name, value in unet.state_dict().items()}


def vae_weights(vae: Any) -> dict[str, torch.Tensor]:
    """Return an autoencoder's weights in the original names, without prefix."""
    found = {}
    for name, value in vae.state_dict().items():
        original = _vae_name(name, len(vae.config.block_out_channels))
        is_projection = re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", original)
        found[original] = value[:, :, None, None] if is_projection else value
    return found


def open_clip_weights(encoder: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of transformers' CLIP text encoder in open_clip's names."""
    found, ends = {}, {"self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    ends |= {"layer_norm1": "ln_1", "layer_norm2": "ln_2"}
    for name, value in encoder.items():
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            found["text_projection"] = value.T
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            block, layer, end = f"transformer.resblocks.{match[1]}", match[2], match[3]
            if layer == "self_attn.q_proj":
                others = (
                    encoder[f"text_model.{name}".replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")
                )
                found[f"{block}.attn.in_proj_{end}"] = torch.cat(list(others))
            elif layer in ends:
                found[f"{block}.{ends[layer]}.{end}"] = value
        else:
            renamed = {"embeddings.token_embedding.weight": "token_embedding.weight"}
            renamed |= {"embeddings.position_embedding.weight": "positional_embedding"}
            found[renamed.get(name, name.replace("final_layer_norm", "ln_final"))] = value
    return found


def _unet_name(name: str, layers: int, crossed: list[bool]) -> str:
    for ours, original in _UNET_ENDS.items():
        if name.startswith(ours + "."):
            return original + name.removeprefix(ours)
    side, rest = name.split("_", 1)[0], name.split(".", 1)[1]
    level, kind, index, rest = ("0", *rest.split(".", 2)) if side == "mid" else rest.split(".", 3)
    if kind == "resnets":
        inner, _, end = rest.rpartition(".")
        rest = f"{_RESNET[inner]}.{end}"
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}.{rest}"
    first = int(level) * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.{rest.replace('conv', 'op', 1)}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{1 + crossed[int(level)]}.{rest}"
    stack, number = (
        ("input_blocks", first + int(index) + 1) if side == "down" else ("output_blocks", first + int(index))
    )
    return f"{stack}.{number}.{1 if kind == 'attentions' else 0}.{rest}"


def _vae_name(name: str, levels: int) -> str:
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"mid_block\.attentions\.0\.(\w+(?:\.0)?)\.", lambda m: f"mid.attn_1.{_ATTENTION[m[1]]}.", name)
    name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
    name = re.sub(r"(down|up)samplers\.0", r"\1sample", name)
    return (
        name.replace("resnets", "block").replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    )
