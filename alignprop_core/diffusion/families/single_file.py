"""Load a complete Stable Diffusion from one safetensors file in the original code's names, as ComfyUI and A1111 do."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from alignprop_core.diffusion.networks import refuse_unfilled
from alignprop_core.errors import ModelError

_UNET, _VAE, _TEXT = (
    "model.diffusion_model.",
    "first_stage_model.",
    ("cond_stage_model.", "conditioner.", "text_encoders."),
)
_T5 = "text_encoders.t5xxl."
_PIPELINES = {
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "xl_base": "StableDiffusionXLPipeline",
    **dict.fromkeys(("sd3", "sd35_medium", "sd35_large"), "StableDiffusion3Pipeline"),
}
"""Kinds of models, as diffusers names them, that alignprop loads from one file."""
_FEW = 2
_OTHER_CONTENT = {
    "a LoRA; set model.loras to it": ("lora_", "lora.", "hada_", "lokr_"),
    "a textual-inversion embedding": ("emb_params", "string_to_param", "clip_l", "clip_g"),
    "a ControlNet": ("control_model.", "controlnet_"),
    "a text encoder alone": ("text_model.", "encoder.layers.", "resblocks.", *_TEXT),
    "a UNet alone": ("time_embedding.", "time_embed.", _UNET),
    "a VAE alone; set model.vae to its diffusers folder": ("encoder.", "decoder.", _VAE),
}
"""What a file without a complete model contains, by parts of its weights' names; the first that fits."""


def open_single_file(file: Path, given: Mapping[str, Any], others: Collection[str] = ()) -> Any:
    """Load a pipeline.

    Args:
        file: a safetensors file, whatever its name is.
        given: parts that come from elsewhere.
        others: parts that are to come from files of their own, which needs a folder's configs.

    Raises:
        ModelError: the file is damaged, contains something else, or its configuration is not on this machine.
    """
    import diffusers

    if others:
        raise ModelError(
            f"model.{next(iter(others))} is a file, and so is model.base. Set model.base to the diffusers folder or "
            "hub id whose configs and tokenizers the parts need."
        )
    weights = _shapes(file)
    kind, repository = _check_content(file, weights, given)
    if kind == "StableDiffusion3Pipeline" and not any(name.startswith(_T5) for name in weights):
        given = {**given, "text_encoder_3": None, "tokenizer_3": None}
    try:
        with _named_safetensors(file) as path:
            pipeline = getattr(diffusers, kind).from_single_file(path, **given)
    except NotImplementedError as error:
        if "meta tensor" not in str(error):
            raise
        # Weights that the file lacks stay on the meta device, from which torch cannot move them.
        raise ModelError(
            f"{file} lacks weights of its denoiser or vae, which would stay random, so the model is not used. "
            "The file is damaged or contains only a part of a model: download a complete one."
        ) from error
    except OSError as error:
        if _cached(repository):
            raise
        raise ModelError(
            f"model.base: {file} contains weights alone. Its configuration is that of {repository}, which is not on "
            f"this machine and could not be downloaded. Fetch it once, with a connection: "
            f'hf download {repository} --include "*.json" --include "*.txt"'
        ) from error
    for part, network in pipeline.components.items():
        if isinstance(network, nn.Module) and part not in given:
            refuse_unfilled(network, part, file)
    return pipeline


def _check_content(file: Path, weights: Mapping[str, Tensor], given: Collection[str]) -> tuple[str, str]:
    """Refuse a file that is not a complete Stable Diffusion; return its pipeline and its configuration's repository."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, infer_diffusers_model_type

    def has(*starts: str) -> bool:
        return any(name.startswith(starts) for name in weights)

    kind = infer_diffusers_model_type(weights)  # "v1" also if it knows none of the weights
    repository = str(fetch_diffusers_config(weights)["pretrained_model_name_or_path"])
    if kind not in _PIPELINES:
        raise ModelError(
            f'{file} contains a model of another kind ("{kind}", as {repository}); from a single file, alignprop runs '
            "Stable Diffusion 1, 2, XL and 3 that turn a prompt alone into an image. If it is another model that "
            "alignprop runs, set model.base to its diffusers folder or hub id and model.transformer to this file."
        )
    if not has(_UNET) or not (has(_VAE) or has(*_TEXT)):
        found = [what for what, parts in _OTHER_CONTENT.items() if any(p in name for p in parts for name in weights)]
        if not found and len(weights) <= _FEW:  # diffusers saves an embedding by the name of its word
            found = ["a textual-inversion embedding"]
        what = found[0] if found else f"no model that alignprop knows (its first weight is {min(weights, default='-')})"
        raise ModelError(f"{file} contains {what}. model.base needs a complete model: UNet, VAE and text encoder.")
    lacking = {"text encoder": not has(*_TEXT), "VAE": not has(_VAE) and "vae" not in given}
    if missing := [part for part, lacks in lacking.items() if lacks]:
        raise ModelError(
            f"{file} contains a denoiser without a {missing[0]}, as some programs save it. model.base needs a complete "
            "model: denoiser, VAE and text encoder. Or set model.base to a diffusers folder, and model.unet or "
            "model.transformer to this file."
        )
    return _PIPELINES[kind], repository


def _shapes(file: Path) -> dict[str, Tensor]:
    """Return the file's weights by name, without values."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {n: torch.empty(opened.get_slice(n).get_shape(), device="meta") for n in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelError(f"{file} is damaged ({error}); download it again.") from error


def _cached(repository: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, "model_index.json"), str)


@contextmanager
def _named_safetensors(file: Path) -> Iterator[Path]:
    """Give a file a name that diffusers reads as safetensors: it would unpickle any other."""
    if file.suffix == ".safetensors":
        yield file
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        try:
            os.symlink(file.absolute(), path)
        except OSError as error:  # Windows needs a permission for it
            raise ModelError(f"{file}: rename it so that it ends in .safetensors ({error}).") from error
        yield path
