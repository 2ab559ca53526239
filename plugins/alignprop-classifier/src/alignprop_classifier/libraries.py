"""Networks of timm, torchvision and transformers: their architecture, names and preprocessing, without any download.

The weights come through `alignprop_core.weights`, which looks on this machine and says what to fetch; torchvision's are
looked for where torchvision itself keeps them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from alignprop_classifier.config import ClassifierConfig
from alignprop_classifier.headers import checked
from alignprop_classifier.network import IMAGENET, REWARD, Classifier, fill, imagenet_names, other_architecture
from alignprop_core.errors import ConfigError, WeightsError, complaint, did_you_mean
from alignprop_core.weights import find_weights, load_state_dict, quiet_transformers, read_json


def from_timm(name: str, path: Path | None, classes: Sequence[str] | None) -> Classifier:
    """Build a timm model by its name; its weights are the file given, else the hub's, from the local cache."""
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
        hint = did_you_mean(name, tags) or (f" There are: {', '.join(tags[:20])}." if tags else "")
        raise ConfigError(
            f'options.model: timm has no pretrained weights "{tag}" of {architecture}.{hint} With a file of your own '
            f"(options.weights), write timm/{architecture}."
        ) from error
    cfg: dict[str, Any] = dict(network.pretrained_cfg)
    if path is None:
        repository = cfg.get("hf_hub_id")
        if not repository:
            raise WeightsError(f"timm has no weights for {name}: give options.weights a file.")
        path = find_weights(f"hub:{repository}/{cfg.get('hf_hub_filename') or 'model.safetensors'}", reward=REWARD)
    fill(network, load_state_dict(path), path, f"timm/{name}")
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
    """Build a torchvision classifier by name; its weights are the file given, else torchvision's own, cached."""
    from torchvision import models

    known = models.list_models(module=models)  # of classifiers alone
    if name not in known:
        hint = did_you_mean(name, known) or f" It has {len(known)}, such as resnet50 and vit_b_16."
        raise ConfigError(f'options.model: torchvision has no classifier "{name}".{hint}')
    weights: Any = getattr(models.get_model_weights(name), "DEFAULT", None)
    head: dict[str, Any] = {} if classes is None else {"num_classes": len(classes)}
    network = models.get_model(name, weights=None, **head)
    fill(network, load_state_dict(path or _torch_hub_file(name, weights)), path, f"torchvision/{name}")
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
    """Return torchvision's own file from torch's cache, where its library puts it; its name ends in its checksum."""
    file = str(weights.url).rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.is_file():
        raise WeightsError(
            f'The weights of "torchvision/{name}" are not on this machine: file {file}. Download {weights.url} and put '
            f"it into {path.parent}, or name it with the option weights: PATH."
        )
    digest = re.search(r"-([0-9a-f]{8,})\.", file)
    with open(path, "rb") as stream:
        if digest and not hashlib.file_digest(stream, "sha256").hexdigest().startswith(digest[1]):
            raise WeightsError(f"{path} is damaged: its sha256 does not start with {digest[1]}. Download it again.")
    return path


def from_transformers(name: str, path: Path | None, classes: Sequence[str] | None) -> Classifier:
    """Build a transformers classifier from a folder or a hub id in the local cache, with the file given or its own."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    folder = Path(name).expanduser()
    local = folder.is_dir()
    if not local and name.count("/") != 1:
        raise ConfigError(f'options.model: "{name}" is neither a folder nor a hub id (owner/name) of transformers.')

    def file_of(file: str) -> Path:
        return folder / file if local else find_weights(f"hub:{name}/{file}", reward=REWARD)

    settings = file_of("config.json")
    if not settings.is_file():
        raise ConfigError(f"options.model: {folder} holds no config.json, so it is no model of transformers.")
    read_json(settings)
    changes: dict[str, Any] = {} if classes is None else {"id2label": dict(enumerate(classes))}
    try:
        config = AutoConfig.from_pretrained(
            str(settings.parent), local_files_only=True, trust_remote_code=False, **changes
        )
    except Exception as error:  # whatever a wrong value leads to
        raise WeightsError(f"{settings}: transformers cannot use it: {complaint(error)}. Fetch it anew.") from error
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ConfigError(f"options.model: {name} is a {config.model_type} model, which has no classifier.")
    kind = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    kind = kind[0] if isinstance(kind, (list, tuple)) else kind
    preset, own = _preprocessor(file_of, local)
    if path is None:
        path = file_of("model.safetensors")
        if not path.is_file():
            raise WeightsError(_no_safetensors(folder))
    tensors = load_state_dict(path)
    try:
        # By way of from_pretrained, which knows how the names of tensors have changed between its versions.
        with quiet_transformers():
            network, info = kind.from_pretrained(
                None, config=config, state_dict=tensors, ignore_mismatched_sizes=True, output_loading_info=True
            )
    except Exception as error:  # sizes that no network can be built of, a package that is missing
        raise WeightsError(
            f"{settings}: no {kind.__name__} can be built from it and {path.name}: {complaint(error)}."
        ) from error
    wrong = [f"{key} is {tuple(has)}, not {tuple(wanted)};" for key, has, wanted in sorted(info["mismatched_keys"])]
    wrong += [f"{key} is missing;" for key in sorted(info["missing_keys"])]
    if wrong:
        raise other_architecture(path, f"transformers/{name}", wrong)
    labels = tuple(str(config.id2label[i]) for i in range(len(config.id2label)))
    size = _size(preset) or getattr(config, "image_size", None) or 224
    return Classifier(
        network.float(),
        labels,
        imagenet=len(labels) == IMAGENET,
        image_size=int(size if isinstance(size, int) else size[0]),
        mean=own.mean or (0.5, 0.5, 0.5),
        std=own.std or (0.5, 0.5, 0.5),
        interpolation="bicubic" if preset.get("resample") == 3 else "bilinear",
        crop=own.crop or 1.0,
        fit="squash" if _squashes(preset) else "crop",
        floor=True,
    )


def _no_safetensors(folder: Path) -> str:
    """Return the message for a folder that lacks its weights under the name they are looked for."""
    others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".safetensors"))
    if not others:
        return f"{folder} holds no model.safetensors. Fetch or copy the model's weights into it."
    if len(others) == 1:
        return (
            f"{folder} holds no model.safetensors, but {others[0]}. Name it with the option weights: "
            f"{folder / others[0]} (it is read without unpickling), or save the model anew with save_pretrained()."
        )
    return (
        f"{folder} holds no model.safetensors, but {', '.join(others[:3])}. One file is read: save the model anew with "
        'save_pretrained(max_shard_size="100GB").'
    )


def _preprocessor(file_of: Any, local: bool) -> tuple[dict[str, Any], ClassifierConfig]:
    """Return what stands in preprocessor_config.json, and its mean, std and crop as options; empty without the file."""
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
                raise WeightsError(f"{path}: {key}: sides are whole numbers from 1 (it is {sides!r}). Fetch it again.")
    try:
        values = {"mean": preset.get("image_mean"), "std": preset.get("image_std"), "crop": _crop(preset)}
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path}: crop_pct: {complaint(error)}. Fetch it again.") from error
    names = {"mean": "image_mean", "std": "image_std", "crop": "crop_pct"}
    return preset, checked(values, str(path), names)


def _size(preset: Mapping[str, Any]) -> int | None:
    """The side of the network's input, out of the forms transformers has had for it."""
    size = preset.get("crop_size") if preset.get("do_center_crop") else preset.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    return size if isinstance(size, int) else None


def _squashes(preset: Mapping[str, Any]) -> bool:
    """Whether all of a picture is resized to a square: where both sides are given, and in ConvNeXt's from 384 on."""
    size = preset.get("size")
    if preset.get("crop_pct"):
        return (_size(preset) or 0) >= 384
    return isinstance(size, int) or (isinstance(size, dict) and "height" in size)


def _crop(preset: Mapping[str, Any]) -> float:
    """The part of the shorter side that is kept."""
    if preset.get("crop_pct"):
        return 1.0 if _squashes(preset) else float(preset["crop_pct"])
    whole = preset.get("size")
    whole = (whole.get("shortest_edge") or whole.get("height")) if isinstance(whole, dict) else whole
    kept = _size(preset)
    return min(1.0, kept / whole) if kept and whole and preset.get("do_center_crop") else 1.0
