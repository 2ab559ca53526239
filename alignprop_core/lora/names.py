"""Names of layers in LoRA files: which network a key belongs to, and the layer's name in diffusers' models."""

from __future__ import annotations

import re

DENOISER = "denoiser"
_PREFIXES = {
    "unet.": DENOISER,
    "transformer.": DENOISER,
    "diffusion_model.": DENOISER,
    "model.diffusion_model.": DENOISER,
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    # kohya's scripts
    "lora_unet_": DENOISER,
    "lora_transformer_": DENOISER,
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
PEFT = "base_model.model."
"""How module names start in peft's own files."""

# Module names that contain an underscore: kohya's flattened names use it in place of dots, too.
COMPOUNDS = {
    "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "single_transformer_blocks", "ff_context", "to_q",
    "to_k", "to_v", "to_out", "to_add_out", "add_q_proj", "add_k_proj", "add_v_proj", "proj_in", "proj_out",
    "proj_mlp", "conv_in", "conv_out", "conv_shortcut", "linear_1", "linear_2", "time_embedding", "add_embedding",
    "time_emb_proj", "time_text_embed", "timestep_embedder", "guidance_embedder", "text_embedder", "context_embedder",
    "x_embedder", "pos_embed", "norm_out", "norm1_context", "encoder_hid_proj", "text_model", "self_attn", "q_proj",
    "k_proj", "v_proj", "out_proj", "text_projection", "context_refiner", "noise_refiner", "feed_forward", "linear_in",
    "linear_out", "to_qkv_mlp_proj", "adaLN_modulation", "cap_embedder",
}  # fmt: skip
_WORDS = {
    "attentions", "resnets", "downsamplers", "upsamplers", "conv", "conv1", "conv2", "attn", "attn1", "attn2", "ff",
    "net", "proj", "norm", "norm1", "linear", "encoder", "layers", "mlp", "fc1", "fc2", "attention", "w1", "w2", "w3",
}  # fmt: skip
_FLATTENED = re.compile(  # whole parts between dots, the longest first
    r"(?<![^.])(" + "|".join(sorted((c.replace("_", r"\.") for c in COMPOUNDS), key=len, reverse=True)) + r")(?![^.])"
)

# Layers of the original U-Net, which kohya's scripts keep for SDXL, and diffusers' names of them.
_ORIGINAL_ROOT = re.compile(r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\.\d")
_ORIGINAL = {
    r"^input_blocks_0_0$": "conv_in",
    r"^out_2$": "conv_out",
    r"^time_embed_0$": "time_embedding_linear_1",
    r"^time_embed_2$": "time_embedding_linear_2",
    r"^label_emb_0_0$": "add_embedding_linear_1",
    r"^label_emb_0_2$": "add_embedding_linear_2",
    r"^middle_block_0_": "mid_block_resnets_0_",
    r"^middle_block_1_": "mid_block_attentions_0_",
    r"^middle_block_2_": "mid_block_resnets_1_",
    r"^input_blocks_1_": "down_blocks_0_0_",
    r"^input_blocks_2_": "down_blocks_0_1_",
    r"^input_blocks_3_": "down_blocks_0_2_",
    r"^input_blocks_4_": "down_blocks_1_0_",
    r"^input_blocks_5_": "down_blocks_1_1_",
    r"^input_blocks_6_": "down_blocks_1_2_",
    r"^input_blocks_7_": "down_blocks_2_0_",
    r"^input_blocks_8_": "down_blocks_2_1_",
    r"^input_blocks_9_": "down_blocks_2_2_",
    r"^input_blocks_10_": "down_blocks_3_0_",
    r"^input_blocks_11_": "down_blocks_3_1_",
    r"^output_blocks_0_": "up_blocks_0_0_",
    r"^output_blocks_1_": "up_blocks_0_1_",
    r"^output_blocks_2_": "up_blocks_0_2_",
    r"^output_blocks_3_": "up_blocks_1_0_",
    r"^output_blocks_4_": "up_blocks_1_1_",
    r"^output_blocks_5_": "up_blocks_1_2_",
    r"^output_blocks_6_": "up_blocks_2_0_",
    r"^output_blocks_7_": "up_blocks_2_1_",
    r"^output_blocks_8_": "up_blocks_2_2_",
    r"^output_blocks_9_": "up_blocks_3_0_",
    r"^output_blocks_10_": "up_blocks_3_1_",
    r"^output_blocks_11_": "up_blocks_3_2_",
    # now down_blocks or up_blocks, block, layer, kind: what the original numbers, diffusers names
    r"_blocks_(\d)_\d_0_op$": r"_blocks_\1_downsamplers_0_conv",
    r"_blocks_(\d)_\d_[12]_conv$": r"_blocks_\1_upsamplers_0_conv",
    r"_blocks_(\d)_(\d)_0_": r"_blocks_\1_resnets_\2_",
    r"_blocks_(\d)_(\d)_1_": r"_blocks_\1_attentions_\2_",
    r"_in_layers_2$": "_conv1",
    r"_out_layers_3$": "_conv2",
    r"_emb_layers_1$": "_time_emb_proj",
    r"_skip_connection$": "_conv_shortcut",
}

# Names in files of other versions, and today's.
_VERSIONS = {
    r"\.processor\.to_out$": ".to_out.0",  # diffusers before 0.22: attn1.processor.to_q_lora.down
    r"\.processor\.": ".",
    r"(encoder\.layers\.\d+\.self_attn)\.to_(q|k|v|out)$": r"\1.\2_proj",
    r"^encoder\.layers\.": "text_model.encoder.layers.",  # transformers 5 dropped CLIP's outer "text_model"
}


def flatten_name(module: str) -> str:
    """Return kohya's name of a module: `down_blocks.0.attn1.to_q` -> `down_blocks_0_attn1_to_q`."""
    return module.replace(".", "_")


def unflatten_name(flat: str) -> str:
    """Return the inverse of `flatten_name`, for modules of diffusers' denoisers and CLIP text encoders.

    Names of the original U-Net become diffusers' (`middle_block_1_proj_in` -> `mid_block.attentions.0.proj_in`). A name
    with an unknown word is returned as it is, since any of its underscores may be a dot.
    """
    renamed = flat
    for original, diffusers in _ORIGINAL.items():
        renamed = re.sub(original, diffusers, renamed)
    name = _FLATTENED.sub(lambda match: match[0].replace(".", "_"), renamed.replace("_", "."))
    known = (part in COMPOUNDS or part in _WORDS or part.isdecimal() for part in name.split("."))
    return name if all(known) else flat


def locate_module(module: str) -> tuple[str, str]:
    """Return (component, module name) of a key without its ending: `lora_te_text_model_...` is a text encoder's."""
    module = module.removeprefix(PEFT)
    prefix = next((prefix for prefix in _PREFIXES if module.startswith(prefix)), "")
    # Without a prefix, the file was saved from the denoiser alone.
    component, module = _PREFIXES.get(prefix, DENOISER), module.removeprefix(prefix)
    if "." not in module or _ORIGINAL_ROOT.match(module):
        module = unflatten_name(flatten_name(module))
    for earlier, today in _VERSIONS.items():
        module = re.sub(earlier, today, module)
    return component, module
