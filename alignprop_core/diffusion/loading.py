"""Load a base model, by name, hub id, folder or single file, as a frozen diffusers pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignprop_core.diffusion.networks import load_part, load_parts, refuse_unfilled
from alignprop_core.errors import ModelError
from alignprop_core.locate import find_base, find_vae
from alignprop_core.registry.registry import Registry


def load_pipeline(
    base: str,
    *,
    registry: Registry,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    vae: str | None = None,
) -> Any:
    """Load a pipeline for sampling and fine-tuning: frozen, in eval mode, channels last, without a safety checker.

    Only safetensors weights are read; nothing is unpickled. A network whose file lacks weights is refused.

    Args:
        base: a registered model, a diffusers folder, one .safetensors file, or a hub id "owner/name".
        registry: where registered models are looked up.
        device: where the networks go.
        dtype: dtype of all networks.
        vae: folder or hub id of another VAE, or None for the model's own.

    Raises:
        ModelError: the model is not found or cannot be loaded, or a network's file lacks weights or contains them
            in another shape.
    """
    source = find_base(base, registry)
    autoencoder = None if vae is None else find_vae(vae)
    try:
        with _quietly():
            pipeline = _open(source, {} if autoencoder is None else {"vae": _open_vae(autoencoder)})
    # Beyond unreadable files, these are what the libraries raise on files that another version of them wrote.
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, ImportError, TypeError) as error:
        raise ModelError(_not_here(source) or f'"{base}" could not be loaded from {source}: {error}') from error
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            nn.Module.to(component, dtype=dtype)  # diffusers' own to() warns about modules that the model lacks
    return prepare(pipeline, device)


def _not_here(source: Path | str) -> str:
    """Return the message for a hub model that cannot be downloaded; empty if it is in the cache or a local path."""
    from huggingface_hub import constants, try_to_load_from_cache

    if Path(source).exists() or isinstance(try_to_load_from_cache(str(source), "model_index.json"), str):
        return ""
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached or has no such model"
    return (
        f"model.base: {source} is not on this machine and could not be downloaded: {why}. With a connection, the run "
        f"downloads it to {constants.HF_HUB_CACHE}. Or set model.base to a local diffusers folder or .safetensors "
        "file."
    )


def _open(source: Path | str, given: dict[str, Any]) -> Any:
    import diffusers

    if Path(source).is_file():
        try:
            pipeline = diffusers.StableDiffusionPipeline.from_single_file(source, **given)
        except NotImplementedError as error:
            if "meta tensor" not in str(error):
                raise
            # Weights that the file lacks stay on the meta device, from which torch cannot move them.
            raise ModelError(
                f"{source} lacks weights of its unet or vae, which would stay random, so the model is not used. "
                "The file is damaged or contains only a part of a model: download a complete one."
            ) from error
        for part, network in pipeline.components.items():
            if isinstance(network, nn.Module) and part not in given:
                refuse_unfilled(network, part, source)
        return pipeline
    index = diffusers.DiffusionPipeline.load_config(source)
    if index.get("safety_checker", (None, None))[0] is not None:
        given = {**given, "safety_checker": None, "requires_safety_checker": False}
    folder = source
    if not Path(source).is_dir():
        folder = diffusers.DiffusionPipeline.download(source, use_safetensors=True, **given)
    given = {**given, **load_parts(Path(folder), index, given)}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, use_safetensors=True, **given)
    pipeline.register_to_config(_name_or_path=str(source))  # the hub id, not the path of its cache
    return pipeline


def _open_vae(source: Path | str) -> nn.Module:
    import diffusers

    own = Path(source) / "vae"
    return load_part(diffusers.AutoencoderKL, own if own.is_dir() else source, "vae")


@contextmanager
def _quietly() -> Iterator[None]:
    """Hide the libraries' progress bars and their deprecation warnings about each other."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [module for module in (diffusers_logging, transformers_logging) if module.is_progress_bar_enabled()]
    for module in shown:
        module.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # diffusers still passes this argument, about which huggingface_hub warns.
            warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument is deprecated")
            yield
    finally:
        for module in shown:
            module.enable_progress_bar()


def prepare(pipeline: Any, device: torch.device | str) -> Any:
    """Freeze every network of a pipeline, put it in eval mode, on its device, channels last; returns the pipeline."""
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    for name in ("unet", "vae"):
        # Convolutions run faster channels last, on CPUs and on tensor cores alike.
        module = getattr(pipeline, name, None)
        if module is not None:
            module.to(memory_format=torch.channels_last)
    return pipeline
