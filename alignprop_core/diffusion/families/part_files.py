"""Load a part of a model from a safetensors file of its own, as ComfyUI keeps them: denoiser, text encoder or VAE."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignprop_core.diffusion.networks import load_part, refuse_unfilled
from alignprop_core.errors import ModelError, complaint
from alignprop_core.locate import PARTS

_PREFIXES = {
    **dict.fromkeys(("unet", "transformer"), ("model.diffusion_model.", "diffusion_model.")),
    "vae": ("first_stage_model.", "vae."),
}
"""What names start with in a file that contains other parts too."""
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL", "AutoencoderKLFlux2")
_SCALES = (".scale_weight", ".weight_scale")
"""Ends of the names of factors of 8-bit weights, without ".weight"."""
_NO_WEIGHTS = ("scaled_fp8", ".scale_input", ".input_scale", ".comfy_quant")


def open_parts(
    files: Mapping[str, Path], index: Mapping[str, Any], folder: Path, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """Load parts of a pipeline, each from one file.

    Args:
        files: part -> safetensors file, in diffusers' names, those of the original code or of transformers.
        index: the pipeline's model_index.json.
        folder: the pipeline's diffusers folder, for the parts' configs.
        dtype: dtype of the networks; 8-bit weights are cast up.

    Raises:
        ModelError: the model has no such part, or the file is damaged or does not fit the part's config.
    """
    networks = {}
    for part, file in files.items():
        library, kind = index.get(part) or (None, "")
        if library is None:
            has = ", ".join(sorted(set(PARTS) & {name for name, entry in index.items() if entry != [None, None]}))
            raise ModelError(f"model.{part}: the model has no such part; its parts are {has}.")
        networks[part] = _open(file, part, getattr(import_module(library), kind), folder, dtype)
    return networks


def refuse_lacking(folder: Path, index: Mapping[str, Any], given: Collection[str]) -> None:
    """Raise `ModelError` if a folder has a network's config without weights, and no file of them is given."""
    for part in PARTS:
        own = folder / part
        weights = [*own.glob("*.safetensors*"), *own.glob("*.bin*")]
        if index.get(part, [None])[0] is not None and part not in given and own.is_dir() and not weights:
            raise ModelError(
                f"model.{part} is not set, and {own} has no weights (*.safetensors). Set it to a safetensors file of "
                "this part, or download the folder's."
            )


def _open(file: Path, part: str, kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    weights = _weights(file, _PREFIXES.get(part, ()), dtype)
    try:
        if kind.__module__.startswith("transformers."):
            config = kind.config_class.from_pretrained(folder / part)
            network, info = kind.from_pretrained(
                None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
            shapes = {name: (tuple(has), tuple(wants)) for name, has, wants in info["mismatched_keys"]}
            refuse_unfilled(network, part, file, info["missing_keys"], shapes)
        else:
            network = _diffusers_network(weights, part, kind, folder, dtype)
            refuse_unfilled(network, part, file)
    except ModelError:
        raise
    except Exception as error:  # the libraries raise many types for weights of another model
        raise ModelError(f"model.{part}: {file} does not fit {folder / part}: {complaint(error)}.") from error
    assert isinstance(network, nn.Module)
    return network


def _diffusers_network(weights: dict[str, Tensor], part: str, kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        network = kind.from_config(kind.load_config(folder, subfolder=part))
    if network.state_dict().keys() == weights.keys():  # diffusers' names, also of classes that it cannot convert
        network.load_state_dict(weights, assign=True)
        return network  # type: ignore[no-any-return]
    if part == "unet":  # where diffusers' conversion looks
        weights = {f"{_PREFIXES[part][0]}{name}": value for name, value in weights.items()}
    return kind.from_single_file(weights, config=str(folder), subfolder=part, torch_dtype=dtype)  # type: ignore[no-any-return]


def _weights(file: Path, prefixes: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights of a part, in `dtype`; of its names alone, without prefix, if the file contains several parts.

    8-bit floating-point weights are multiplied by their scales, as ComfyUI does.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            prefix = next((p for p in prefixes if any(name.startswith(p) for name in names)), "")
            names = [name for name in names if name.startswith(prefix) and not name.endswith(_NO_WEIGHTS)]
            scales = {
                f"{name.removesuffix(end)}.weight": opened.get_tensor(name).float()
                for end in _SCALES
                for name in names
                if name.endswith(end)
            }
            weights = {}
            for name in names:
                if name.endswith(_SCALES):
                    continue
                value = opened.get_tensor(name)
                if not value.is_floating_point() and name.endswith(".weight"):
                    raise ModelError(
                        f"{file}: {name} is {value.dtype}, quantized weights that alignprop does not read; use the "
                        "file in bf16, fp16 or fp8."
                    )
                if name in scales:
                    scale = scales[name]
                    value = value.float() * scale.view(*scale.shape, *[1] * (value.ndim - scale.ndim))
                weights[name.removeprefix(prefix)] = value.to(dtype) if value.is_floating_point() else value
    except SafetensorError as error:
        raise ModelError(f"{file} is damaged ({error}); download it again.") from error
    return weights


def download(repository: str, index: Mapping[str, Any], files: Collection[str]) -> str:
    """Download a repository without the weights that come from files, and without those beside the parts' folders."""
    from huggingface_hub import snapshot_download

    wanted = [f"{part}/*.safetensors" for part, entry in index.items() if part not in files and isinstance(entry, list)]
    return str(snapshot_download(repository, allow_patterns=["*.json", "*.txt", "*.model", *wanted]))


def open_vae(source: Path | str) -> nn.Module:
    """Load an autoencoder from a folder or hub id, its own or a whole model's; `ModelError` if it is something else."""
    import diffusers

    own = Path(source) / "vae"
    source = own if own.is_dir() else source
    kind = diffusers.AutoencoderKL.load_config(source).get("_class_name", "AutoencoderKL")
    if kind not in AUTOENCODERS:
        raise ModelError(f"{source} is a {kind}; alignprop decodes with {', '.join(AUTOENCODERS)}.")
    return load_part(getattr(diffusers, kind), source, "vae")
