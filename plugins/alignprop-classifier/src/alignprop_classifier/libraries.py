"""Classifiers of timm, torchvision and transformers: network, class names and preprocessing, without any download.

Weights are found by `alignprop_core.weights` on this machine; its error for a missing file names the command that
fetches it. torchvision's weights are read from torch's own cache.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from alignprop_classifier.config import ClassifierConfig
from alignprop_classifier.file_options import options_from_file
from alignprop_classifier.network import (
    IMAGENET,
    REWARD,
    Classifier,
    architecture_error,
    imagenet_names,
    load_tensors,
)
from alignprop_core.errors import ConfigError, WeightsError, complaint, did_you_mean
from alignprop_core.weights import find_weights, load_state_dict, quiet_transformers, read_json


def from_timm(name: str, path: Path | None, classes: Sequence[str] | None) -> Classifier:
    """Build a timm model.

    Args:
        name: timm's model name, with or without a pretrained tag.
        path: the weights; None for timm's published weights, from the local hub cache.
        classes: class names; None for the model's own.

    Raises:
        ConfigError: timm has no such model or tag.
        WeightsError: the weights are not on this machine, or do not fit.
    """
    import timm
    from timm.data import ImageNetInfo, infer_imagenet_subset

    if not timm.is_model(name):
        raise ConfigError(f'options.model: timm has no model "{name}".{did_you_mean(name, timm.list_models())}')
    head: dict[str, Any] = {} if classes is None else {"num_classes": len(classes)}
    try:
        network: Any = timm.create_model(name, pretrained=False, **head)
    except RuntimeError as error:
        architecture, _, tag = name.partition(".")
        tags = timm.list_pretrained(f"{architecture}.*")
        if not tag or name in tags:
            raise
        hint = did_you_mean(name, tags) or (f" Available: {', '.join(tags[:20])}." if tags else "")
        raise ConfigError(
            f'options.model: timm has no pretrained weights "{tag}" of {architecture}.{hint} To use your own file '
            f"(options.weights), set model to timm/{architecture}."
        ) from error
    cfg: dict[str, Any] = dict(network.pretrained_cfg)
    if path is None:
        repository = cfg.get("hf_hub_id")
        if not repository:
            raise WeightsError(f"timm publishes no weights for {name}. Set options.weights to a file.")
        path = find_weights(f"hub:{repository}/{cfg.get('hf_hub_filename') or 'model.safetensors'}", reward=REWARD)
    load_tensors(network, load_state_dict(path), path, f"timm/{name}")
    subset = infer_imagenet_subset(cfg) if classes is None else None
    table = ImageNetInfo(subset) if subset else None
    count = int(network.num_classes)
    names = [table.index_to_description(i) if table else f"class {i}" for i in range(count)]
    return Classifier(
        network,
        tuple(names),
        imagenet=count == IMAGENET and table is not None,
        image_size=int(cfg["input_size"][-1]),
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        interpolation="bilinear" if cfg.get("interpolation") == "bilinear" else "bicubic",
        crop=float(cfg.get("crop_pct") or 0.875),
        fit="squash" if cfg.get("crop_mode") == "squash" else "crop",
    )


def from_torchvision(name: str, path: Path | None, classes: Sequence[str] | None) -> Classifier:
    """Build a torchvision classifier.

    Args:
        name: torchvision's model name.
        path: the weights; None for torchvision's default weights, from torch's cache.
        classes: class names; None for the model's own.

    Raises:
        ConfigError: torchvision has no such classifier.
        WeightsError: the weights are not on this machine, damaged, or do not fit.
    """
    from torchvision import models

    known = models.list_models(module=models)  # classifiers only
    if name not in known:
        hint = did_you_mean(name, known) or f" It has {len(known)} classifiers, such as resnet50 and vit_b_16."
        raise ConfigError(f'options.model: torchvision has no classifier "{name}".{hint}')
    weights: Any = getattr(models.get_model_weights(name), "DEFAULT", None)
    head: dict[str, Any] = {} if classes is None else {"num_classes": len(classes)}
    network = models.get_model(name, weights=None, **head)
    load_tensors(network, load_state_dict(path or _torch_hub_file(name, weights)), path, f"torchvision/{name}")
    preset = weights.transforms()
    count = len(weights.meta["categories"])
    return Classifier(
        network,
        imagenet_names() if count == IMAGENET else tuple(weights.meta["categories"]),
        imagenet=count == IMAGENET,
        image_size=int(preset.crop_size[0]),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=str(preset.interpolation.value),
        crop=preset.crop_size[0] / preset.resize_size[0],
    )


def _torch_hub_file(name: str, weights: Any) -> Path:
    """Return torchvision's weights file from torch's cache, verified against the sha256 prefix in its name."""
    file = str(weights.url).rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.is_file():
        raise WeightsError(
            f'The weights of "torchvision/{name}" are not on this machine: {file} is missing. Download {weights.url} '
            f"to {path.parent}, or set the option weights: PATH."
        )
    digest = re.search(r"-([0-9a-f]{8,})\.", file)
    with open(path, "rb") as stream:
        if digest and not hashlib.file_digest(stream, "sha256").hexdigest().startswith(digest[1]):
            raise WeightsError(f"{path} is damaged: its sha256 does not start with {digest[1]}. Download it again.")
    return path


def from_transformers(name: str, path: Path | None, classes: Sequence[str] | None) -> Classifier:
    """Build a transformers image classifier.

    Args:
        name: a folder, or a hub id (owner/name) in the local cache.
        path: the weights; None for model.safetensors of the folder or repository.
        classes: class names; None for the model's own.

    Raises:
        ConfigError: the name is neither a folder nor a hub id, or the model is not an image classifier.
        WeightsError: a file is not on this machine, is damaged, or does not fit.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    folder = Path(name).expanduser()
    local = folder.is_dir()
    if not local and name.count("/") != 1:
        raise ConfigError(
            f'options.model: "{name}" is neither a folder nor a hub id. Use transformers/ followed by '
            "owner/name or a folder."
        )

    def file_of(file: str) -> Path:
        return folder / file if local else find_weights(f"hub:{name}/{file}", reward=REWARD)

    settings = file_of("config.json")
    if not settings.is_file():
        raise ConfigError(
            f"options.model: {folder} contains no config.json. Set it to a folder written by save_pretrained()."
        )
    read_json(settings)
    changes: dict[str, Any] = {} if classes is None else {"id2label": dict(enumerate(classes))}
    try:
        config = AutoConfig.from_pretrained(
            str(settings.parent), local_files_only=True, trust_remote_code=False, **changes
        )
    except Exception as error:  # transformers raises many types for an invalid value
        raise WeightsError(
            f"{settings}: transformers cannot read this config: {complaint(error)}. Fix it, or fetch it again."
        ) from error
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ConfigError(
            f"options.model: {name} is a {config.model_type} model, and transformers has no image classifier of this "
            "type. Choose an image classification model."
        )
    kind = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    kind = kind[0] if isinstance(kind, (list, tuple)) else kind
    preset, options = _read_preprocessor(file_of, local)
    if path is None:
        path = file_of("model.safetensors")
        if not path.is_file():
            raise WeightsError(_missing_safetensors_message(folder))
    tensors = load_state_dict(path)
    try:
        # from_pretrained also maps tensor names of earlier versions of transformers.
        with quiet_transformers():
            network, info = kind.from_pretrained(
                None, config=config, state_dict=tensors, ignore_mismatched_sizes=True, output_loading_info=True
            )
    except Exception as error:  # invalid sizes, a missing package
        raise WeightsError(
            f"{settings}: {kind.__name__} cannot be built from this config and {path.name}: {complaint(error)}. Fetch "
            "the files again."
        ) from error
    problems = [
        f"{key} has shape {tuple(found)}, expected {tuple(expected)};"
        for key, found, expected in sorted(info["mismatched_keys"])
    ]
    problems += [f"{key} is missing;" for key in sorted(info["missing_keys"])]
    if problems:
        raise architecture_error(path, f"transformers/{name}", problems)
    labels = tuple(str(config.id2label[i]) for i in range(len(config.id2label)))
    size = _input_size(preset) or getattr(config, "image_size", None) or 224
    return Classifier(
        network.float(),
        labels,
        imagenet=len(labels) == IMAGENET,
        image_size=int(size if isinstance(size, int) else size[0]),
        mean=options.mean or (0.5, 0.5, 0.5),
        std=options.std or (0.5, 0.5, 0.5),
        interpolation="bicubic" if preset.get("resample") == 3 else "bilinear",
        crop=options.crop or 1.0,
        fit="squash" if _squashes(preset) else "crop",
        floor=True,
    )


def _missing_safetensors_message(folder: Path) -> str:
    """Return the message for a folder without model.safetensors."""
    others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".safetensors"))
    if not others:
        return f"{folder} contains no model.safetensors. Fetch or copy the weights of the model into it."
    if len(others) == 1:
        return (
            f"{folder} contains no model.safetensors, but {others[0]}. Set the option weights: {folder / others[0]} "
            "(it is read without unpickling), or save the model again with save_pretrained()."
        )
    return (
        f"{folder} contains no model.safetensors, but {', '.join(others[:3])}. Only a single file can be read: save "
        'the model again with save_pretrained(max_shard_size="100GB").'
    )


def _read_preprocessor(file_of: Any, local: bool) -> tuple[dict[str, Any], ClassifierConfig]:
    """Return preprocessor_config.json, and its mean, std and crop as options; both empty without the file."""
    try:
        path = file_of("preprocessor_config.json")
    except WeightsError:
        return {}, ClassifierConfig()
    if local and not path.is_file():
        return {}, ClassifierConfig()
    preset = read_json(path)
    for key in ("size", "crop_size"):
        sides = preset.get(key)
        for side in sides.values() if isinstance(sides, dict) else sides if isinstance(sides, list) else [sides]:
            if side is not None and not (isinstance(side, int) and side > 0):
                raise WeightsError(
                    f"{path}: {key}: sizes must be positive integers (got {sides!r}). Fetch the file again."
                )
    try:
        values = {"mean": preset.get("image_mean"), "std": preset.get("image_std"), "crop": _crop_fraction(preset)}
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path}: crop_pct: {complaint(error)}. Fetch the file again.") from error
    file_keys = {"mean": "image_mean", "std": "image_std", "crop": "crop_pct"}
    return preset, options_from_file(values, str(path), file_keys)


def _input_size(preset: Mapping[str, Any]) -> int | None:
    """Return the side of the network's input in pixels, from any of transformers' forms; None if not given."""
    size = preset.get("crop_size") if preset.get("do_center_crop") else preset.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    return size if isinstance(size, int) else None


def _squashes(preset: Mapping[str, Any]) -> bool:
    """Return whether images are squashed to a square: if both sides are given, and for ConvNeXt from 384 px."""
    size = preset.get("size")
    if preset.get("crop_pct"):
        return (_input_size(preset) or 0) >= 384
    return isinstance(size, int) or (isinstance(size, dict) and "height" in size)


def _crop_fraction(preset: Mapping[str, Any]) -> float:
    """Return the fraction of the shorter side that is kept by the center crop."""
    if preset.get("crop_pct"):
        return 1.0 if _squashes(preset) else float(preset["crop_pct"])
    resized = preset.get("size")
    resized = (resized.get("shortest_edge") or resized.get("height")) if isinstance(resized, dict) else resized
    kept = _input_size(preset)
    return min(1.0, kept / resized) if kept and resized and preset.get("do_center_crop") else 1.0
