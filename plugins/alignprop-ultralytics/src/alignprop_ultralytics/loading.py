"""From a weights file to a YOLO detector. Nothing is unpickled here."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import Tensor

from alignprop_core.errors import WeightsError
from alignprop_core.weights import load_state_dict, read_header
from alignprop_counting.coco import COCO_NAMES
from alignprop_ultralytics.detector import Yolo, head_problem
from alignprop_ultralytics.offline import DetectionModel, yaml_model_load

GENERIC = "yolo"
"""The detector whose files say their own architecture."""


def build_detector(name: str, weights: Path, image_size: int | None) -> Yolo:
    """Build a YOLO from a weights file: the factory of all detectors of this plugin.

    Args:
        name: `yolo`, or an architecture such as `yolo11n`, for files without a header.
        weights: a safetensors file; `python -m alignprop_ultralytics.convert` makes one from a checkpoint.
        image_size: longest side; None takes the file's, else 640.

    Raises:
        WeightsError: the file is a pickle, does not say its architecture, or does not fit it.
    """
    if weights.suffix != ".safetensors":
        raise WeightsError(
            f"{weights}: YOLO weights are read from .safetensors files only; checkpoints of ultralytics are pickles, "
            f"which can run code when opened. If you trust it: "
            f"python -m alignprop_ultralytics.convert {weights} {weights.with_suffix('.safetensors')}"
        )
    header = read_header(weights)
    own = header.get("ultralytics")
    if own is None and name == GENERIC:
        raise WeightsError(
            f'{weights}: its header does not say the architecture. Name it ("detector: yolo11n"), or make the file '
            "with python -m alignprop_ultralytics.convert, which writes it down."
        )
    if own is not None:
        yaml, names = own["yaml"], tuple(own["names"][str(i)] for i in range(len(own["names"])))
    else:
        yaml, names = yaml_model_load(f"{name}.yaml"), COCO_NAMES
    return Yolo(
        filled(yaml, names, load_state_dict(weights), weights), names, image_size or header.get("image_size", 640)
    )


def filled(yaml: dict[str, Any], names: tuple[str, ...], state: dict[str, Tensor], file: Path) -> Any:
    """Build the network of a model description with the given weights, in float32."""
    model = DetectionModel(deepcopy(yaml), nc=len(names), verbose=False)
    problem = head_problem(model)
    if problem:
        raise WeightsError(f"{file}: {problem}.")
    own = model.state_dict()
    wrong = [f"{key} is missing" for key in own if key not in state]
    wrong += [f"{key} is not part of it" for key in state if key not in own]
    wrong += [
        f"{key} is {tuple(value.shape)}, not {tuple(own[key].shape)}"
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise WeightsError(
            f"{file}: does not fit the architecture ({len(names)} classes): {'; '.join(wrong[:3])}{more}. Name the "
            "architecture it was trained with, or convert the checkpoint again."
        )
    model.load_state_dict(state)
    model.names = dict(enumerate(names))
    return model.float().eval()
