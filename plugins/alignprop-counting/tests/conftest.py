"""Small detectors with random weights, as files on disk: the real architectures, built without a download."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
)

sys.path.insert(0, str(Path(__file__).parent))  # helper modules of this folder

NAMES = ("cat", "dog", "fox", "bird", "traffic light")
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}


def rtdetr(num_queries: int = 12) -> RTDetrForObjectDetection:
    config = RTDetrConfig(
        backbone_config=RTDetrResNetConfig(
            embedding_size=16,
            hidden_sizes=[16, 16, 24, 32],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        ),
        encoder_in_channels=[16, 24, 32],
        encoder_hidden_dim=32,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        d_model=32,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=32,
        decoder_layers=2,
        decoder_attention_heads=2,
        num_queries=num_queries,
        num_denoising=0,
        **LABELS,
    )
    return RTDetrForObjectDetection(config)


def detr() -> DetrForObjectDetection:
    config = DetrConfig(
        backbone_config=ResNetConfig(
            embedding_size=16,
            hidden_sizes=[16, 24, 32, 48],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage4"],
        ),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=12,
        **LABELS,
    )
    return DetrForObjectDetection(config)


BUILD: dict[str, Callable[[], Any]] = {"rtdetr": rtdetr, "detr": detr}


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a random network the statistics of a trained one, so that scores differ between locations and images."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) or hasattr(module, "running_var"):
                module.running_mean.copy_(0.1 * torch.randn(module.running_mean.shape, generator=g))
                module.running_var.copy_(0.05 + 0.1 * torch.rand(module.running_var.shape, generator=g))
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter, generator=g)
            elif name.endswith("bias") and ("class" in name or "score_head" in name):
                parameter.copy_(torch.randn(parameter.shape, generator=g))
    return model.eval()


def write(model: nn.Module, file: Path, image_size: int = 64) -> Path:
    config: Any = model.config
    architecture = {"architecture": type(model).__name__, "config": json.loads(config.to_json_string())}
    state = {key: value.clone().contiguous() for key, value in model.state_dict().items()}
    save_file(state, file, {"config": json.dumps({"transformers": architecture, "image_size": image_size})})
    return file


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """Helpers of this module for test modules, which cannot import it."""
    return SimpleNamespace(build=BUILD, names=NAMES, rtdetr=rtdetr, lively=lively, write=write)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Detector name -> a weights file."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    return {name: write(lively(build()), folder / f"{name}.safetensors") for name, build in BUILD.items()}


@pytest.fixture(params=list(BUILD))
def name(request: pytest.FixtureRequest) -> str:
    """The detectors, one after another."""
    return str(request.param)
