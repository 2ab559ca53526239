"""Load a base model, by name, hub id, folder or single file, as a frozen diffusers pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignprop_core.diffusion.families.find import find_family
from alignprop_core.diffusion.families.part_files import download, open_parts, open_vae, refuse_lacking
from alignprop_core.diffusion.families.single_file import open_single_file
from alignprop_core.diffusion.networks import load_parts
from alignprop_core.errors import AlignpropError, ModelError, complaint, under
from alignprop_core.locate import find_base, find_part
from alignprop_core.registry.registry import Registry
from alignprop_core.specs import FamilySpec
from alignprop_core.weights.read import read_json


def load_pipeline(
    base: str,
    *,
    registry: Registry,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    families: Sequence[FamilySpec] | None = None,
    parts: Mapping[str, str] | None = None,
) -> Any:
    """Load a pipeline for sampling and fine-tuning: frozen, in eval mode, channels last, without a safety checker.

    Only safetensors weights are read; nothing is unpickled. A network whose file lacks weights is refused.

    Args:
        base: a registered model, a diffusers folder, one .safetensors file, or a hub id "owner/name".
        registry: where registered models are looked up.
        device: where the networks go.
        dtype: dtype of all networks.
        families: refuse a pipeline that none of these families nor the core's can run, before its networks load; None
            loads any pipeline.
        parts: parts that are not the model's own: vae (folder, hub id or safetensors file), unet, transformer,
            text_encoder, text_encoder_2, text_encoder_3 (safetensors file).

    Raises:
        ModelError: the model is not found or cannot be loaded, or a network's file lacks weights or contains them
            in another shape.
    """
    source = find_base(base, registry)
    given: dict[str, Any] = {}
    files: dict[str, Path] = {}
    for part, name in (parts or {}).items():
        with under(f"model.{part}"), _explained(name, found := find_part(part, name), "config.json"), _quietly():
            if Path(found).is_file():
                files[part] = Path(found)
            else:
                given[part] = open_vae(found)
    with _explained(base, source), _quietly():
        if Path(source).is_file():
            pipeline = open_single_file(Path(source), given, files)
        else:
            pipeline = _open(source, given, files, dtype, families)
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            nn.Module.to(component, dtype=dtype)  # diffusers' own to() warns about modules that the model lacks
    return prepare(pipeline, device)


@contextmanager
def _explained(name: str, source: Path | str, file: str = "model_index.json") -> Iterator[None]:
    """Turn what the libraries raise on unreadable files, or files of another version, into a `ModelError`."""
    try:
        yield
    except AlignpropError:
        raise
    except Exception as error:  # the libraries raise many types for an invalid value
        if missing := _not_here(source, file):
            raise ModelError(missing) from error
        raise ModelError(f'"{name}" could not be loaded from {source}: {complaint(error)}') from error


@contextmanager
def can_run() -> Iterator[None]:
    """Turn what the libraries raise if a loaded model's parts do not fit each other into a `ModelError`."""
    try:
        yield
    except (AlignpropError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # raised by the libraries' own code, any type
        if "CUDA error" in str(error):  # the device's or the driver's fault
            raise
        with under("model.base"):
            raise ModelError(f"the model loads, but cannot generate an image: {complaint(error)}.") from error


def _not_here(source: Path | str, file: str) -> str:
    """Return the message for a hub model that cannot be downloaded; empty if it is in the cache or a local path."""
    from huggingface_hub import constants, try_to_load_from_cache

    if Path(source).exists() or isinstance(try_to_load_from_cache(str(source), file), str):
        return ""
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached or has no such model"
    base = file == "model_index.json"
    return (
        f"{'model.base: ' if base else ''}{source} is not on this machine and could not be downloaded: {why}. With a "
        f"connection, the run downloads it to {constants.HF_HUB_CACHE}. Or set {'model.base' if base else 'it'} to a "
        f"local diffusers folder{' or .safetensors file' if base else ''}."
    )


def _open(
    source: Path | str,
    given: dict[str, Any],
    files: dict[str, Path],
    dtype: torch.dtype,
    families: Sequence[FamilySpec] | None,
) -> Any:
    import diffusers

    index = diffusers.DiffusionPipeline.load_config(source)
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if not kind:
        raise ModelError(f"{source}: its model_index.json names no pipeline class (_class_name); download it again.")
    family = None if families is None else find_family(str(kind), families)
    # Parts that the model lacks, such as a third text encoder, which diffusers would ask for.
    given = {**{part: None for part, entry in index.items() if entry == [None, None]}, **given}
    if index.get("safety_checker", (None, None))[0] is not None:
        given = {**given, "safety_checker": None, "requires_safety_checker": False}
    folder = source
    if not Path(source).is_dir():
        if files:
            folder = download(str(source), index, files)
        else:
            folder = diffusers.DiffusionPipeline.download(source, use_safetensors=True, **given)
    if family is not None:
        listed = [part for part, entry in index.items() if isinstance(entry, list) and entry[0] is not None]
        known = {part: Path(folder) / part / "config.json" for part in listed}
        configs: dict[str, Any] = {part: read_json(file) if file.is_file() else {} for part, file in known.items()}
        family.check(configs | {part: network.config for part, network in given.items() if hasattr(network, "config")})
    refuse_lacking(Path(folder), index, {*given, *files})
    given = {**given, **open_parts(files, index, Path(folder), dtype)}
    given = {**given, **load_parts(Path(folder), index, given)}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, use_safetensors=True, **given)
    pipeline.register_to_config(_name_or_path=str(source))  # the hub id, not the path of its cache
    return pipeline


@contextmanager
def _quietly() -> Iterator[None]:
    """Hide the libraries' progress bars, tables of missing weights (`load_part` reports them) and advice."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [
        (module, module.get_verbosity(), module.is_progress_bar_enabled())
        for module in (diffusers_logging, transformers_logging)
    ]
    for module, level, _ in before:
        module.disable_progress_bar()
        module.set_verbosity(max(level, module.ERROR))
    try:
        with warnings.catch_warnings():
            # diffusers still passes this argument, about which huggingface_hub warns.
            warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument is deprecated")
            yield
    finally:
        for module, level, shown in before:
            module.set_verbosity(level)
            if shown:
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
