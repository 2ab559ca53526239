"""A classifier network and what it needs to know; filling one with tensors. Shared by all sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from alignprop_core.errors import WeightsError

REWARD = "image_classifier"
IMAGENET = 1000


@dataclass(frozen=True)
class Classifier:
    """A network and what it needs to know.

    Attributes:
        network: (B, 3, S, S) normalised -> (B, C) logits, or an object that has them as `.logits`.
        names: C names; other names of the same class after commas.
        imagenet: whether the classes are ImageNet's 1000.
        image_size: S, pixels.
        mean, std: of the channels, for pictures in [0, 1].
        interpolation: "bilinear" or "bicubic".
        crop: the part of the shorter side that is kept: the picture is resized to S / crop and cut to S.
        fit: "crop" or "squash": whether a picture that is not square keeps its shape when it is resized.
        floor: whether the middle begins at half the margin rounded down, as in transformers; else to the nearest even
            pixel, as in torchvision and timm.
    """

    network: nn.Module
    names: tuple[str, ...]
    imagenet: bool
    image_size: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop: float = 0.875
    fit: str = "crop"
    floor: bool = False


def logits_of(output: Any) -> Tensor:
    """Return the logits of a network's output: a tensor, or an object that holds them."""
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def imagenet_names() -> tuple[str, ...]:
    """Return ImageNet's 1000 classes in their order, other names after commas; from the tables inside timm."""
    from timm.data import ImageNetInfo

    table = ImageNetInfo()
    return tuple(table.index_to_description(index) for index in range(IMAGENET))


def fill(network: nn.Module, tensors: Mapping[str, Any], path: Path | None, model: str) -> None:
    """Load tensors by name, all of them or an error; nested checkpoints and data-parallel names are understood."""
    for nest in ("state_dict", "model"):
        if isinstance(tensors.get(nest), Mapping):
            tensors = tensors[nest]
    if tensors and all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise other_architecture(path, model, str(error).splitlines()[1:4]) from error


def other_architecture(path: Path | None, model: str, problems: Sequence[str]) -> WeightsError:
    """Return the error for a file made for another architecture; `problems` are the loader's own words."""
    shown = " ".join(" ".join(problems[:3]).split())[:300].rstrip(";. ")
    return WeightsError(
        f"{path or 'The weights'} does not fit {model}: {shown}. Name the architecture the file was made for with "
        "options.model; if only the last layer differs in size, list its classes with options.classes."
    )
