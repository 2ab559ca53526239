"""From the options to a network: which library, which weights, which classes, how a picture is put before it.

Nothing is fetched here: what is missing is an error that says what to fetch.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from alignprop_classifier import OUTSIDE_JUDGES
from alignprop_classifier.config import ClassifierConfig
from alignprop_classifier.headers import PICTURE_KEYS, checked
from alignprop_classifier.judge import outside_judge
from alignprop_classifier.libraries import from_timm, from_torchvision, from_transformers
from alignprop_classifier.network import REWARD, Classifier, logits_of
from alignprop_core.errors import ConfigError, WeightsError, did_you_mean
from alignprop_core.weights import find_weights, read_header

_SOURCES = {"timm": from_timm, "torchvision": from_torchvision, "transformers": from_transformers}


def load_classifier(config: ClassifierConfig) -> Classifier:
    """Build the network the options name, with its weights.

    Raises:
        ConfigError: no such model, or classes and network do not fit.
        WeightsError: the weights are not here, damaged, of another architecture, or say something wrong of themselves.
    """
    path, header = None, {}
    if config.weights != "default":
        path = find_weights(config.weights, reward=REWARD)
        header = read_header(path)
        if isinstance(header.get("classes"), str):
            raise WeightsError(f"{path}: its header: classes: must be a list of names. Mend the file.")
    own = checked({key: header.get(key) for key in ("model", "classes", *PICTURE_KEYS)}, f"{path}: its header")
    model = own.model if "model" in own.model_fields_set else config.model
    classes = _classes(config.classes if config.classes is not None else own.classes)
    source, _, name = model.partition("/")
    if model in OUTSIDE_JUDGES:
        found = outside_judge(model, path)
    elif source in _SOURCES and name:
        with warnings.catch_warnings():
            # What the libraries say of their own defaults (initial weights, renamed options) is not for our users.
            warnings.simplefilter("ignore")
            found = _SOURCES[source](name, path, classes)
    else:
        hint = "" if source in _SOURCES else did_you_mean(model, (*OUTSIDE_JUDGES, *(f"{s}/" for s in _SOURCES)))
        raise ConfigError(
            f'options.model: "{model}" is no classifier.{hint} Write '
            f"{', '.join(OUTSIDE_JUDGES)}, timm/NAME, torchvision/NAME, or transformers/ with a hub id or a folder."
        )
    for said in (own, config):
        found = replace(found, **{key: v for key in PICTURE_KEYS if (v := getattr(said, key)) is not None})
    if classes is not None:
        found = replace(found, names=tuple(classes), imagenet=False)
    return _tried(found, model)


def _tried(found: Classifier, model: str) -> Classifier:
    """Run the network once, on a grey picture: what does not fit shows here and not in the middle of a run."""
    size = found.image_size
    try:
        with torch.no_grad():
            outputs = logits_of(found.network.eval()(torch.zeros(1, 3, size, size)))
    except Exception as error:  # the library's own complaint, whatever its type
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"options.image_size: {model} cannot take pictures of {size} x {size}: {reason}") from error
    if outputs.ndim != 2 or outputs.shape[1] != len(found.names):
        raise ConfigError(
            f"options.classes: {model} gives outputs of shape {tuple(outputs.shape)} and there are "
            f"{len(found.names)} class names. List the network's classes, in its order, under options.classes."
        )
    return found


def _classes(given: Sequence[str] | str | None) -> list[str] | None:
    """Return class names from the options: a list, or a text file with one a line."""
    if isinstance(given, str):
        try:
            lines = Path(given).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"options.classes: {given} cannot be read: {error}.") from error
        given = [line.strip() for line in lines if line.strip()]
    if given is not None and len(given) < 2:
        raise ConfigError("options.classes: a classifier has at least two classes.")
    return None if given is None else [str(name) for name in given]
