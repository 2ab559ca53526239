"""Load the classifier that the options select: library, weights, class names, preprocessing.

Nothing is downloaded: missing weights are an error that names the command that fetches them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from alignprop_classifier import EFFICIENTNET_LITE
from alignprop_classifier.config import ClassifierConfig
from alignprop_classifier.efficientnet_lite import from_efficientnet_lite
from alignprop_classifier.file_options import PREPROCESSING_KEYS, options_from_file
from alignprop_classifier.libraries import from_timm, from_torchvision, from_transformers
from alignprop_classifier.network import REWARD, Classifier, logits_of
from alignprop_classifier.preprocessing import Preprocessing, ResizeCrop
from alignprop_core.errors import ConfigError, WeightsError, complaint, did_you_mean
from alignprop_core.weights import find_weights, read_header

_SOURCES = {"timm": from_timm, "torchvision": from_torchvision, "transformers": from_transformers}


def load_classifier(config: ClassifierConfig) -> Classifier:
    """Build the network that the options select, and load its weights.

    The header of a weights file may store its model, classes and preprocessing. Its model overrides the option `model`;
    for classes and preprocessing the options override the header.

    Raises:
        ConfigError: the model is unknown, or classes or image size do not fit the network.
        WeightsError: the weights are not on this machine, damaged, of another architecture, or have an invalid header.
    """
    path, header = None, {}
    if config.weights != "default":
        path = find_weights(config.weights, reward=REWARD)
        header = read_header(path)
        if isinstance(header.get("classes"), str):
            raise WeightsError(
                f"{path}: its header: classes: must be a list of names. Fix the file, or fetch it again."
            )
    stored = options_from_file(
        {key: header.get(key) for key in ("model", "classes", *PREPROCESSING_KEYS)}, f"{path}: its header"
    )
    model = stored.model if "model" in stored.model_fields_set else config.model
    classes = _read_classes(config.classes if config.classes is not None else stored.classes)
    source, _, name = model.partition("/")
    if model in EFFICIENTNET_LITE:
        classifier = from_efficientnet_lite(model, path)
    elif source in _SOURCES and name:
        with warnings.catch_warnings():
            # The libraries warn about their own defaults (initial weights, renamed options).
            warnings.simplefilter("ignore")
            classifier = _SOURCES[source](name, path, classes)
    else:
        hint = "" if source in _SOURCES else did_you_mean(model, (*EFFICIENTNET_LITE, *(f"{s}/" for s in _SOURCES)))
        raise ConfigError(
            f'options.model: "{model}" is not a classifier.{hint} Use '
            f"{', '.join(EFFICIENTNET_LITE)}, timm/NAME, torchvision/NAME, or transformers/ followed by a hub id or a "
            "folder."
        )
    given = {
        key: value
        for options in (stored, config)
        for key in PREPROCESSING_KEYS
        if (value := getattr(options, key)) is not None
    }
    classifier = replace(classifier, preprocessing=_preprocessing(classifier, given, model))
    if classes is not None:
        classifier = replace(classifier, names=tuple(classes), imagenet=False)
    _check_forward(classifier, model)
    return classifier


def _preprocessing(classifier: Classifier, options: Mapping[str, Any], model: str) -> Preprocessing:
    """Return the model's preprocessing with the given options; the options alone, if the model has none."""
    if classifier.preprocessing is not None:
        return classifier.preprocessing.with_options(options) if options else classifier.preprocessing
    missing = [key for key in ("image_size", "mean", "std") if key not in options]
    if missing:
        raise WeightsError(
            f"{model} has no preprocessor_config.json, so the size and the scale of its images are unknown. Copy the "
            f"file of the original model into the folder (for a hub id, fetch it: `alignprop rewards fetch "
            f"hub:owner/name/preprocessor_config.json`), or set {', '.join(f'options.{key}' for key in missing)}."
        )
    side = options["image_size"]
    return ResizeCrop(side, side).with_options(options)


def _check_forward(classifier: Classifier, model: str) -> None:
    """Run the network once on a blank image, so that a mismatch is reported on loading and not during a run."""
    assert classifier.preprocessing is not None
    height, width = classifier.preprocessing.size
    try:
        with torch.no_grad():
            logits = logits_of(classifier.network.eval()(torch.zeros(1, 3, height, width)))  # (1, C)
    except Exception as error:  # raised by the library's own code, any type
        raise ConfigError(
            f"options.image_size: {model} does not accept images of {height} x {width} pixels: {complaint(error)}. Set "
            "another image_size, or leave it out."
        ) from error
    if logits.ndim != 2 or logits.shape[1] != len(classifier.names):
        raise ConfigError(
            f"options.classes: {model} returns outputs of shape {tuple(logits.shape)}, but there are "
            f"{len(classifier.names)} class names. List the network's classes, in its order, in options.classes."
        )


def _read_classes(given: Sequence[str] | str | None) -> list[str] | None:
    """Return the class names of the option `classes`: a list, or a text file with one name per line."""
    if isinstance(given, str):
        try:
            lines = Path(given).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"options.classes: {given} cannot be read: {error}. Set it to a list of names or a UTF-8 text file."
            ) from error
        given = [line.strip() for line in lines if line.strip()]
    if given is not None and len(given) < 2:
        raise ConfigError("options.classes: a classifier has at least two classes. List all classes of the network.")
    return None if given is None else [str(name) for name in given]
