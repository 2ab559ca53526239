"""Read complete LoRA files: all components and the header, from either format."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from alignprop_core.errors import LoraError
from alignprop_core.locate import find_lora
from alignprop_core.lora.files import LoraFile
from alignprop_core.lora.formats import DENOISER, read_lora

_KEPT = ("modelspec.architecture", "modelspec.title", "ss_base_model_version", "ss_v2")


def read_file(path: str | Path) -> LoraFile:
    """Read a LoRA of either format.

    Args:
        path: a file, a LoRA folder or a run folder.

    Raises:
        LoraError: as `read_lora`; or the file changes only text encoders.
    """
    file = find_lora(path)
    parts = read_lora(file)
    if DENOISER not in parts:
        raise LoraError(f"{file} changes only {', '.join(sorted(parts))}; LoRAs without a denoiser are not supported.")
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata() or {}
        first = next(key for key in opened.keys() if not key.startswith(("text_encoder", "lora_te")))  # noqa: SIM118
    component = "transformer" if first.startswith(("transformer.", "lora_transformer_")) else "unet"
    kept = {key: value for key, value in header.items() if key in _KEPT or key.startswith("alignprop.")}
    return LoraFile(parts, component, kept)
