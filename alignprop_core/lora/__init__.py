"""Low-rank adapters on the denoiser: attach, save and load in the formats others read.

A layer's weight W becomes W + scale * B A, with A (rank, in) and B (out, rank); W is frozen, B starts at zero
(LoRA, https://arxiv.org/abs/2106.09685). `scale` is alpha / rank, or alpha / sqrt(rank) where it is rank-stabilised
(https://arxiv.org/abs/2312.03732). Files hold `scale * B` and alpha = rank, so every reader gets the same weight
change whether or not it knows alpha or rank-stabilised scaling.
"""

from __future__ import annotations

from alignprop_core.lora.attach import (
    ADAPTER,
    DEFAULT_TARGETS,
    attach,
    attach_frozen,
    current,
    disabled,
    load_state,
    parameters,
    save,
    save_kohya,
    set_strength,
    state,
)
from alignprop_core.lora.bake import bake
from alignprop_core.lora.combine import Mixed, mix, scale
from alignprop_core.lora.formats import (
    Factors,
    load_delta,
    read_lora,
    write_diffusers,
    write_kohya,
)
from alignprop_core.lora.whole import WholeLora, read_whole, write_whole
from alignprop_core.model_files import DIFFUSERS_NAME

__all__ = [
    "ADAPTER",
    "DEFAULT_TARGETS",
    "DIFFUSERS_NAME",
    "Factors",
    "Mixed",
    "WholeLora",
    "attach",
    "attach_frozen",
    "bake",
    "current",
    "disabled",
    "load_delta",
    "load_state",
    "mix",
    "parameters",
    "read_lora",
    "read_whole",
    "save",
    "save_kohya",
    "scale",
    "set_strength",
    "state",
    "write_diffusers",
    "write_kohya",
    "write_whole",
]
