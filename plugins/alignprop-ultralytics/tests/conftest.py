"""Small YOLOs with random weights, from the real model descriptions, scaled down."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from alignprop_ultralytics.offline import DetectionModel, yaml_model_load

NAMES = ("cat", "dog", "fox", "bird", "traffic light")
FAMILIES = ("yolov8n", "yolov10n", "yolo11n", "yolo26n")


def build(architecture: str = "yolo11n", *, kinds: int = len(NAMES), seed: int = 0) -> Any:
    """Build a narrow network whose scores differ between positions and images."""
    yaml = yaml_model_load(f"{architecture}.yaml")
    scale = yaml["scale"] or "n"
    yaml["scales"] = {scale: [0.33, 0.125, 128]}
    torch.manual_seed(seed)
    model = DetectionModel(yaml, nc=kinds, verbose=False)
    model.names = dict(enumerate(NAMES[:kinds]))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.05, 0.3)
            elif isinstance(module, nn.Conv2d) and module.bias is not None:
                module.weight.normal_(0, 2 / module.in_channels**0.5)
                module.bias.normal_(-1, 1)
    return model.eval()


def write(model: Any, file: Path, image_size: int | None = 64) -> Path:
    yaml = {key: value for key, value in model.yaml.items() if key != "yaml_file"}
    names = {str(i): name for i, name in model.names.items()}
    header: dict[str, Any] = {"ultralytics": {"yaml": yaml, "names": names}}
    if image_size is not None:
        header["image_size"] = image_size
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file, {"config": json.dumps(header)})
    return file


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The helpers of this module, which test modules cannot import."""
    return SimpleNamespace(build=build, write=write, names=NAMES)


@pytest.fixture(
    params=[(name, one) for name in FAMILIES for one in (True, False) if not one or name[4:] in ("26n", "v10n")]
)
def head(request: pytest.FixtureRequest) -> tuple[str, bool]:
    """Every architecture with each of its heads: (name, one_to_one)."""
    found: tuple[str, bool] = request.param
    return found


@pytest.fixture(scope="session")
def network() -> Callable[[str], Any]:
    """A function that returns a network by architecture and builds each one once."""
    built: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in built:
            built[name] = build(name).requires_grad_(False)
        return built[name]

    return get
