"""A classifier network with its class names and preprocessing; loading of its tensors. Shared by all sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from alignprop_classifier.preprocessing import Preprocessing
from alignprop_core.errors import WeightsError

REWARD = "image_classifier"
IMAGENET = 1000


@dataclass(frozen=True)
class Classifier:
    """A network with its class names and preprocessing.

    Attributes:
        network: maps (B, 3, H, W) preprocessed images to (B, C) logits, or to an object with the attribute `logits`.
        names: C class names; commas separate synonyms of a class.
        imagenet: whether the classes are the 1000 of ImageNet (ILSVRC 2012).
        preprocessing: maps images to the network's input; None if the model does not come with one.
    """

    network: nn.Module
    names: tuple[str, ...]
    imagenet: bool
    preprocessing: Preprocessing | None


def logits_of(output: Any) -> Tensor:
    """Return the (B, C) logits from a network's output: the tensor itself, or its attribute `logits`."""
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def imagenet_names() -> tuple[str, ...]:
    """Return the names of ImageNet's 1000 classes in order, synonyms after commas, from timm's tables."""
    from timm.data import ImageNetInfo

    table = ImageNetInfo()
    return tuple(table.index_to_description(index) for index in range(IMAGENET))


def state_dict_of(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state dict that may be nested under "state_dict" or "model", without DataParallel's prefix."""
    for nest in ("state_dict", "model"):
        if isinstance(tensors.get(nest), Mapping):
            tensors = tensors[nest]
    if tensors and all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def load_tensors(network: nn.Module, tensors: Mapping[str, Any], path: Path | None, model: str) -> None:
    """Load a state dict strictly.

    Args:
        network: the network, modified in place.
        tensors: a state dict, flat or nested under "state_dict" or "model", with or without DataParallel's prefix.
        path: the file, for messages; None if it is not a single file.
        model: the model, for messages.

    Raises:
        WeightsError: the tensors belong to another architecture.
    """
    try:
        network.load_state_dict(state_dict_of(tensors))
    except RuntimeError as error:
        raise architecture_error(path, model, str(error).splitlines()[1:4]) from error


def architecture_error(path: Path | None, model: str, problems: Sequence[str]) -> WeightsError:
    """Return the error for weights of another architecture; `problems` are the messages of the loading library."""
    shown = " ".join(" ".join(problems[:3]).split())[:300].rstrip(";. ")
    return WeightsError(
        f"{path or 'The weights file'} does not fit {model}: {shown}. Set options.model to the architecture of the "
        "file; if only the last layer differs in size, list its classes in options.classes."
    )
