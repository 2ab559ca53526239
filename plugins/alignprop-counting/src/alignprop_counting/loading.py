"""Loads the detector that the options `detector`, `weights` and `image_size` describe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_NAME,
    DetrConfig,
    DetrForObjectDetection,
    PreTrainedConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
)
from transformers.utils import IMAGE_PROCESSOR_NAME

from alignprop_core.errors import ConfigError, PluginError, WeightsError, complaint
from alignprop_core.registry.registry import Registry, load_object
from alignprop_core.weights import find_weights, load_state_dict, quiet_transformers, read_header, read_json, verify
from alignprop_counting.coco import COCO_NAMES, DETR_NAMES
from alignprop_counting.config import DetectorConfig
from alignprop_counting.detector import Detector
from alignprop_counting.headers import TransformersFolder, TransformersHeader, checked
from alignprop_counting.processors import read_processor
from alignprop_counting.specs import DetectorSpec, find_detector
from alignprop_counting.transformers_detector import Detr, RtDetr

_KINDS: dict[str, tuple[str, Any, Any, type[RtDetr] | type[Detr], tuple[str, ...]]] = {
    "RTDetrForObjectDetection": ("rtdetr", RTDetrForObjectDetection, RTDetrConfig, RtDetr, COCO_NAMES),
    "DetrForObjectDetection": ("detr", DetrForObjectDetection, DetrConfig, Detr, DETR_NAMES),
}
"""Architecture -> detector name, model class, config class, detector class, class names of the full-size model."""


def load_detector(config: DetectorConfig, registry: Registry) -> Detector:
    """Find a detector and its weights, build it, and freeze it.

    Raises:
        PluginError: no plugin, or more than one, offers the detector, or its code is broken.
        WeightsError: the file is missing or does not match the architecture.
        ConfigError: the detector does not support the image size.
    """
    offer = find_detector(config.detector, registry)
    spec = offer.spec
    file = _find(config.weights, spec, registry)
    factory = load_object(offer, spec.factory, "factory")
    if not callable(factory):
        raise PluginError(f"{spec.factory} of {offer.distribution} is not a function. Report this to its authors.")
    detector = factory(spec.name, file, config.image_size)
    if not isinstance(detector, Detector):
        raise PluginError(
            f"{spec.factory} of {offer.distribution} did not return a Detector. Report this to its authors."
        )
    detector.requires_grad_(False).eval()
    _try(detector, "options.image_size" if config.image_size is not None else f"{file}: image_size", spec.name)
    return detector


def _try(detector: Detector, key: str, name: str) -> None:
    """Run the detector once on a gray image, so that an unsupported size fails here and not during a run."""
    size = detector.image_size
    try:
        with torch.no_grad():
            detector(torch.full((1, 3, size, size), 0.5))
    except Exception as error:  # networks raise different types
        allowed = f"Use {detector.allowed_sizes}. " if detector.allowed_sizes else ""
        raise ConfigError(
            f"{key}: the detector {name} does not support images of {size} x {size}. {allowed}({complaint(error)})"
        ) from error


def _find(value: str, spec: DetectorSpec, registry: Registry) -> Path:
    """Return the weights file of an option; `WeightsError` if it is not on this machine."""
    try:
        return _file(value, spec, registry)
    except WeightsError as error:
        # The core's messages name a reward.
        text = str(error).replace(f'reward "{spec.name}"', f'detector "{spec.name}"')
        text = text.replace(f'Reward "{spec.name}"', f'Detector "{spec.name}"')
        raise WeightsError(text) from error


def _file(value: str, spec: DetectorSpec, registry: Registry) -> Path:
    if value != "default":
        # Weight sets are registered under the detector's name: all counting rewards share them.
        return find_weights(value, reward=spec.name, registry=registry)
    if not spec.weights:
        raise WeightsError(f'The detector "{spec.name}" has no default weights file. {spec.get_weights}'.strip())
    default = spec.weights[0]
    if not default.repository:
        return find_weights("default", reward=spec.name, default=default, registry=registry)
    # As a hub: value, so that the fetch command in the message fetches this detector's file only.
    hub = f"hub:{default.repository}/{default.file}"
    path = find_weights(hub, reward=spec.name, registry=registry)
    verify(path, default, f"`alignprop rewards fetch {hub}` replaces it.")
    return path


def transformers_detector(name: str, weights: Path, image_size: int | None) -> Detector:
    """Build RT-DETR or DETR from a weights file: the factory of `rtdetr` and `detr`.

    The architecture comes from the file's header, else from a `config.json` in the same folder (as in a hub
    repository), else it is the full-size one of that name. The preprocessing comes from a `preprocessor_config.json` in
    the same folder, unless the file has a header; otherwise it is the default of the original's image processor.
    """
    header = checked(TransformersHeader, read_header(weights), f"{weights}: its header")
    beside = weights.with_name(CONFIG_NAME)
    values: dict[str, Any] | None = None
    source = weights
    if header.transformers is not None:
        architecture, values = header.transformers.architecture, dict(header.transformers.config)
    elif beside.is_file():
        source, values = beside, read_json(beside)
        architecture = checked(TransformersFolder, values, str(beside)).architectures[0]
    else:
        architecture = next(key for key, kind in _KINDS.items() if kind[0] == name)
    if architecture not in _KINDS:
        raise WeightsError(
            f"{source}: contains a {architecture}; this plugin supports {' and '.join(_KINDS)}. Choose another file."
        )
    found, model_class, config_class, kind, names = _KINDS[architecture]
    if found != name:
        raise WeightsError(f'{source}: contains a {architecture}; write "detector: {found}" for it, not "{name}".')
    with quiet_transformers():
        if values is None:
            config = config_class(id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
        else:
            config = _configuration(config_class, values, source)
        model = _filled(model_class, config, load_state_dict(weights), weights)
    beside = weights.with_name(IMAGE_PROCESSOR_NAME)
    processor = read_processor(beside) if header.transformers is None and beside.is_file() else None
    return kind(model, image_size or header.image_size, processor)


def _configuration(config_class: Any, values: dict[str, Any], source: Path) -> Any:
    try:
        return config_class.from_dict(values)
    except Exception as error:  # wrong values raise different types
        raise WeightsError(
            f"{source}: its configuration is not a {config_class.__name__}: {complaint(error)}. Fetch it again."
        ) from error


def _filled(model_class: Any, config: PreTrainedConfig, state: dict[str, Tensor], file: Path) -> Any:
    """Build the model with the given weights; transformers renames keys of older files."""
    try:
        model, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except ImportError as error:
        raise WeightsError(
            f"{file}: its architecture needs a missing package: {' '.join(str(error).split())} "
            "For DETR with a timm backbone: pip install alignprop-counting[detr]."
        ) from error
    except Exception as error:  # impossible sizes raise different types
        raise WeightsError(
            f"{file}: no {model_class.__name__} can be built from its configuration: {complaint(error)}. "
            "Fetch or create the file again."
        ) from error
    wrong = [
        *(f"{key} is {tuple(has)}, not {tuple(wanted)}" for key, has, wanted in sorted(report["mismatched_keys"])),
        *(f"{key} is missing" for key in sorted(report["missing_keys"])),
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise WeightsError(
            f"{file}: does not match the {model_class.__name__} of its configuration: {'; '.join(wrong[:3])}{more}. "
            "The configuration is the one in its header, else the config.json in the same folder (fetch that too), "
            "else the full-size one."
        )
    return model
