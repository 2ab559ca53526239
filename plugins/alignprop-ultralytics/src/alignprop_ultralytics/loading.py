"""Loads a YOLO detector from a safetensors file. Nothing is unpickled."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from alignprop_core.errors import WeightsError, complaint
from alignprop_core.weights import load_state_dict, read_header
from alignprop_counting.coco import COCO_NAMES
from alignprop_counting.headers import FileHeader, checked
from alignprop_ultralytics.detector import Yolo, head_problem
from alignprop_ultralytics.offline import DetectionModel, tasks, yaml_model_load

GENERIC = "yolo"
"""The detector whose files name their own architecture."""

Layer = Annotated[list[Any], Field(min_length=4, max_length=4)]


class ModelYaml(BaseModel):
    """A model description of ultralytics: layers as [from, repeats, class, arguments].

    Ultralytics looks up class names among all its globals and evaluates `activation` as code. Only subclasses of
    `torch.nn.Module` are therefore accepted as layers, and only classes of `torch.nn` with plain arguments as
    activation.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    backbone: list[Layer]
    head: list[Layer]
    activation: str | None = Field(default=None, pattern=r"^(torch\.)?nn\.\w+\([\w.=, -]*\)$")

    @field_validator("backbone", "head")
    @classmethod
    def _layers(cls, layers: list[list[Any]]) -> list[list[Any]]:
        for _, _, name, _ in layers:
            # The same two places where ultralytics looks for a layer class.
            where, own = (nn, str(name)[3:]) if str(name).startswith("nn.") else (tasks, str(name))
            found = getattr(where, own, None)
            if not (isinstance(found, type) and issubclass(found, nn.Module)):
                raise ValueError(f"{name!r} is not a layer of ultralytics")
        return layers


class Description(FileHeader):
    """Model description, and class names by number."""

    yaml: ModelYaml
    names: dict[str, str]

    @field_validator("names")
    @classmethod
    def _numbered(cls, names: dict[str, str]) -> dict[str, str]:
        if not names or set(names) != {str(i) for i in range(len(names))}:
            raise ValueError('the names must be numbered "0", "1", ... without gaps')
        return names


class YoloHeader(FileHeader):
    """The header that the converter writes."""

    ultralytics: Description | None = None


def build_detector(name: str, weights: Path, image_size: int | None) -> Yolo:
    """Build a YOLO from a weights file; the factory of all detectors of this plugin.

    Args:
        name: `yolo`, or an architecture such as `yolo11n` for files without a header.
        weights: a safetensors file, such as `python -m alignprop_ultralytics.convert` writes.
        image_size: longest side in pixels; None uses the value in the file, or 640 if there is none.

    Raises:
        WeightsError: the file is a pickle, does not name its architecture, or does not match it.
    """
    if weights.suffix != ".safetensors":
        raise WeightsError(
            f"{weights}: YOLO weights must be a .safetensors file. Checkpoints of ultralytics are pickles, which can "
            "run code when they are opened. If you trust the file, convert it: "
            f"python -m alignprop_ultralytics.convert {weights} {weights.with_suffix('.safetensors')}"
        )
    header = checked(YoloHeader, read_header(weights), f"{weights}: its header")
    own = header.ultralytics
    if own is None and name == GENERIC:
        raise WeightsError(
            f"{weights}: its header does not name the architecture. Set it in the config, such as detector: yolo11n, "
            "or convert the checkpoint with python -m alignprop_ultralytics.convert, which stores the architecture."
        )
    if own is not None:
        yaml, names = own.yaml.model_dump(), tuple(own.names[str(i)] for i in range(len(own.names)))
    else:
        yaml, names = yaml_model_load(f"{name}.yaml"), COCO_NAMES
    model = filled(yaml, names, load_state_dict(weights), weights)
    return Yolo(model, names, image_size or header.image_size or 640)


def filled(yaml: dict[str, Any], names: tuple[str, ...], state: dict[str, Tensor], file: Path) -> Any:
    """Build the network of a model description and load the weights into it, in float32."""
    try:
        model = DetectionModel(deepcopy(yaml), nc=len(names), verbose=False)
    except Exception as error:  # an invalid model description can raise anything
        raise WeightsError(
            f"{file}: ultralytics cannot build the network its header describes (ultralytics.yaml): "
            f"{complaint(error)}. Convert the checkpoint again."
        ) from error
    problem = head_problem(model)
    if problem:
        raise WeightsError(f"{file}: {problem}.")
    own = model.state_dict()
    wrong = [f"{key} is missing" for key in own if key not in state]
    wrong += [f"{key} is unexpected" for key in state if key not in own]
    wrong += [
        f"{key} is {tuple(value.shape)}, not {tuple(own[key].shape)}"
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise WeightsError(
            f"{file}: does not match the architecture ({len(names)} classes): {'; '.join(wrong[:3])}{more}. Set "
            "detector to the architecture that the file was trained with, or convert the checkpoint again."
        )
    model.load_state_dict(state)
    model.names = dict(enumerate(names))
    return model.float().eval()
