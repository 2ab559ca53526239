"""Classifiers of timm, torchvision and transformers: network, class names and preprocessing, without any download.

Weights are found by `alignprop_core.weights` on this machine; its error for a missing file names the command that
fetches it. torchvision's weights are read from torch's own cache.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from alignprop_classifier.network import (
    IMAGENET,
    REWARD,
    Classifier,
    architecture_error,
    imagenet_names,
    load_tensors,
    state_dict_of,
)
from alignprop_classifier.preprocessing import Preprocessing, ResizeCrop, TimmTransform
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
    from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config

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
        network, tuple(names), count == IMAGENET and table is not None, TimmTransform(resolve_data_config(cfg))
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
    published: Any = models.get_model_weights(name)
    # A file of an earlier version has the preprocessing of that version.
    named = (own for own in published if path is not None and own.url.endswith(f"/{path.name}"))
    weights: Any = next(named, published.DEFAULT)
    head: dict[str, Any] = {} if classes is None else {"num_classes": len(classes)}
    tensors = load_state_dict(path or _torch_hub_file(name, weights))
    head, preprocessing = _as_published(name, weights, state_dict_of(tensors), head)
    network = models.get_model(name, weights=None, **head)
    load_tensors(network, tensors, path, f"torchvision/{name}")
    count = len(weights.meta["categories"])
    names = imagenet_names() if count == IMAGENET else tuple(weights.meta["categories"])
    return Classifier(network, names, count == IMAGENET, preprocessing)


def _as_published(
    name: str, weights: Any, tensors: Mapping[str, Any], head: Mapping[str, Any]
) -> tuple[dict[str, Any], ResizeCrop]:
    """Return the arguments with which torchvision builds the network for published weights, and their preprocessing."""
    preset = weights.transforms()
    side, arguments = int(preset.crop_size[0]), dict(head)
    preprocessing = ResizeCrop(
        side,
        int(preset.resize_size[0]),
        tuple(preset.mean),
        tuple(preset.std),
        interpolation=str(preset.interpolation.value),
    )
    if name.startswith("vit_"):
        arguments["image_size"] = _vit_side(tensors) or side
        if arguments["image_size"] != side:
            preprocessing = replace(preprocessing, image_size=arguments["image_size"], resized=arguments["image_size"])
    if name in ("googlenet", "inception_v3"):
        # The published weights expect the scale of another library: the network changes it if transform_input is set.
        arguments |= {"transform_input": True, "init_weights": False}
        arguments["aux_logits"] = any(key.lower().startswith("aux") for key in tensors)
    return arguments, preprocessing


def _vit_side(tensors: Mapping[str, Any]) -> int | None:
    """Return the image size of a vision transformer's weights, from its position embedding (1, 1 + patches, D)."""
    positions, patch = tensors.get("encoder.pos_embedding"), tensors.get("conv_proj.weight")
    if positions is None or patch is None or positions.ndim != 3:
        return None
    return math.isqrt(positions.shape[1] - 1) * int(patch.shape[-1])


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
    stored = read_json(settings)
    changes: dict[str, Any] = {} if classes is None else {"id2label": dict(enumerate(classes))}
    try:
        config = AutoConfig.from_pretrained(
            str(settings.parent), local_files_only=True, trust_remote_code=False, **changes
        )
    except Exception as error:  # transformers raises many types for an invalid value
        raise WeightsError(
            f"{settings}: transformers cannot read this config: {complaint(error)}. Fix it, or fetch it again."
        ) from error
    if not config.id2label or sorted(config.id2label) != list(range(len(config.id2label))):
        raise WeightsError(
            f"{settings}: id2label: must map 0, 1, 2, ... to the names of the classes (got "
            f"{repr(config.id2label)[:80]}). Fetch the file again, or list the classes in options.classes."
        )
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ConfigError(
            f"options.model: {name} is a {config.model_type} model, and transformers has no image classifier of this "
            "type. Choose an image classification model."
        )
    kind = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    if isinstance(kind, (list, tuple)):  # with and without a distillation token, for example
        kind = next((own for own in kind if own.__name__ in (config.architectures or ())), kind[0])
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
    if info["mismatched_keys"] and classes is None and not stored.get("id2label"):
        raise WeightsError(
            f"{settings}: id2label: names no classes, and the weights have more than two. List the classes in "
            "options.classes."
        )
    problems = [
        f"{key} has shape {tuple(found)}, expected {tuple(expected)};"
        for key, found, expected in sorted(info["mismatched_keys"])
    ]
    problems += [f"{key} is missing;" for key in sorted(info["missing_keys"])]
    if problems:
        raise architecture_error(path, f"transformers/{name}", problems)
    labels = tuple(str(config.id2label[i]) for i in range(len(config.id2label)))
    side = getattr(config, "image_size", None)
    side = side if isinstance(side, int) else 224
    if config.model_type == "timm_wrapper":
        from timm.data import resolve_data_config

        preprocessing: Preprocessing | None = TimmTransform(resolve_data_config(config.pretrained_cfg))
    else:
        preprocessing = _read_preprocessor(file_of, side)
    return Classifier(network.float(), labels, len(labels) == IMAGENET, preprocessing)


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


def _read_preprocessor(file_of: Callable[[str], Path], side: int) -> Preprocessing | None:
    """Return the model's image processor; None if it has none."""
    # As in transformers, the file of a processor for several inputs comes first.
    for file, key in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        try:
            path = file_of(file)
        except WeightsError:
            continue
        values: Any = read_json(path) if path.is_file() else None
        if values is not None and key is not None:
            values = values.get(key)
        if values is not None:
            from alignprop_classifier.processors import read_processor

            return read_processor(path, values, side)
    return None
