"""Read complete LoRA files: all components and the header, from either format."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import safe_open

from alignprop_core.errors import LoraError
from alignprop_core.locate import find_lora
from alignprop_core.lora.files import LoraFile
from alignprop_core.lora.formats import read_lora
from alignprop_core.lora.names import COMPOUNDS, DENOISER

_KEPT = ("modelspec.architecture", "modelspec.title", "ss_base_model_version", "ss_v2")
_TRANSFORMER = re.compile(r"(single_)?transformer_blocks\.|(layers|context_refiner|noise_refiner)\.\d")
_UNET = re.compile(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)(\.|$)")
_OTHER_STARTS = {
    *("double_blocks", "single_blocks", "joint_blocks", "input_blocks", "middle_block", "output_blocks"),
    *("model", "encoder", "text_model", "text_encoders"),
}
"""Starts of layer names in the original code of FLUX and Stable Diffusion, and of text encoders without a prefix."""


def read_file(path: str | Path, *, portable: bool = True) -> LoraFile:
    """Read a LoRA of either format.

    Args:
        path: a file, a LoRA folder or a run folder.
        portable: refuse layer names that are unknown without the model, as files that are written from them would be
            of no use. With the model, `fit` finds layers by more kinds of names.

    Raises:
        LoraError: as `read_lora`; the file changes only text encoders; or layer names are unknown.
    """
    file = find_lora(path)
    parts = read_lora(file)
    if DENOISER not in parts:
        raise LoraError(f"{file} changes only {', '.join(sorted(parts))}; LoRAs without a denoiser are not supported.")
    with safe_open(file, framework="pt") as opened:
        header, keys = opened.metadata() or {}, opened.keys()
    odd = next((name for part in parts.items() for name in _unknown(*part, keys)), None)
    if portable and odd is not None:
        raise LoraError(
            f"{file}: {odd} is not a layer name of diffusers' models or kohya's scripts for them, so it is unknown "
            "which layer is meant. Load the LoRA in diffusers, save it with save_lora_weights, and use that file."
        )
    kept = {key: value for key, value in header.items() if key in _KEPT or key.startswith("alignprop.")}
    return LoraFile(parts, _component(file, keys, parts[DENOISER]), kept)


def _unknown(component: str, modules: Iterable[str], keys: Sequence[str]) -> Iterator[str]:
    """Yield layer names of other code, and kohya's names with unknown words, which stay without dots."""
    flattened = any(key.startswith(("lora_", "lycoris_")) for key in keys)
    others = _OTHER_STARTS if component == DENOISER else set()
    for module in modules:
        flat = flattened and "_" in module and "." not in module and module not in COMPOUNDS
        if flat or not module or module.split(".")[0] in others:
            yield module


def _component(file: Path, keys: Sequence[str], denoiser: Mapping[str, object]) -> str:
    """Return the denoiser's name in its pipeline: the keys' prefix, or for keys without, by the names of the layers."""
    prefixes = {"unet": ("unet.", "lora_unet_"), "transformer": ("transformer.", "lora_transformer_")}
    named = [name for name, starts in prefixes.items() if any(key.startswith(starts) for key in keys)]
    if len(named) > 1:
        raise LoraError(f"{file} changes a UNet and a transformer; a LoRA is for one kind of model.")
    # kohya's scripts and others write "lora_unet_" for transformers as well.
    unet = any(map(_UNET.match, denoiser)) or (named == ["unet"] and not any(map(_TRANSFORMER.match, denoiser)))
    return "unet" if unet else "transformer"
