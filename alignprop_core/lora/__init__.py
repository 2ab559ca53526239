"""Low-rank adapters (LoRA) on the denoiser: attach, scale, merge, fuse, save and load.

A layer's weight W becomes W + scale * B A, with A (rank, in) and B (out, rank); W is frozen, B starts at zero
(LoRA, https://arxiv.org/abs/2106.09685). `scale` is alpha / rank, or alpha / sqrt(rank) where it is rank-stabilized
(https://arxiv.org/abs/2312.03732). Files hold `scale * B` and alpha = rank, so every reader gets the same weight
change whether or not it knows alpha or rank-stabilized scaling.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

_PUBLIC = {
    "ADAPTER": "alignprop_core.lora.adapters",
    "DEFAULT_TARGETS": "alignprop_core.lora.adapters",
    "DIFFUSERS_NAME": "alignprop_core.locate",
    "LoraFile": "alignprop_core.lora.files",
    "attach": "alignprop_core.lora.adapters",
    "attach_frozen": "alignprop_core.lora.adapters",
    "current": "alignprop_core.lora.adapters",
    "disabled": "alignprop_core.lora.adapters",
    "fuse": "alignprop_core.lora.fusing",
    "load_state": "alignprop_core.lora.adapters",
    "merge": "alignprop_core.lora.merging",
    "parameters": "alignprop_core.lora.adapters",
    "read_lora": "alignprop_core.lora.formats",
    "read_file": "alignprop_core.lora.files",
    "save": "alignprop_core.lora.adapters",
    "scale": "alignprop_core.lora.merging",
    "set_strength": "alignprop_core.lora.adapters",
    "state": "alignprop_core.lora.adapters",
    "write_kohya": "alignprop_core.lora.formats",
    "write_files": "alignprop_core.lora.files",
}

if TYPE_CHECKING:
    from alignprop_core.locate import DIFFUSERS_NAME as DIFFUSERS_NAME
    from alignprop_core.lora.adapters import ADAPTER as ADAPTER
    from alignprop_core.lora.adapters import DEFAULT_TARGETS as DEFAULT_TARGETS
    from alignprop_core.lora.adapters import attach as attach
    from alignprop_core.lora.adapters import attach_frozen as attach_frozen
    from alignprop_core.lora.adapters import current as current
    from alignprop_core.lora.adapters import disabled as disabled
    from alignprop_core.lora.adapters import load_state as load_state
    from alignprop_core.lora.adapters import parameters as parameters
    from alignprop_core.lora.adapters import save as save
    from alignprop_core.lora.adapters import set_strength as set_strength
    from alignprop_core.lora.adapters import state as state
    from alignprop_core.lora.files import LoraFile as LoraFile
    from alignprop_core.lora.files import read_file as read_file
    from alignprop_core.lora.files import write_files as write_files
    from alignprop_core.lora.formats import read_lora as read_lora
    from alignprop_core.lora.formats import write_kohya as write_kohya
    from alignprop_core.lora.fusing import fuse as fuse
    from alignprop_core.lora.merging import merge as merge
    from alignprop_core.lora.merging import scale as scale

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> object:
    """Load a name from its module at first access: importing this package imports no torch."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'alignprop_core.lora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
