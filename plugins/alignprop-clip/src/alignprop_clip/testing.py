"""Tiny CLIP models with random weights, for the tests of rewards that stand on this package. Not for anything else."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignprop_clip.architecture import Architecture
from alignprop_clip.checkpoint import save_clip

IMAGE_SIZE = 32
CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": IMAGE_SIZE, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
"""open_clip's model config of a model that runs in a millisecond."""

PREPROCESS: dict[str, Any] = {
    "image_size": IMAGE_SIZE,
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
}


def tiny_network(config: dict[str, Any] | None = None, *, seed: int = 0, bias: float | None = -2.0) -> nn.Module:
    """Build open_clip's own model from a config, with random weights spread widely enough to tell pictures apart.

    Args:
        config: open_clip's model config; `CLIP` if None.
        seed: of the weights.
        bias: the logit bias; None for a model without.
    """
    from open_clip import CLIP as Plain
    from open_clip import CustomTextCLIP

    config = deepcopy(config or CLIP)
    kind = CustomTextCLIP if config.pop("custom_text", False) else Plain
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: nn.Module = kind(**config, init_logit_bias=bias)
        for parameter in network.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    return network.eval().requires_grad_(False)


def random_state(architecture: Architecture, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random weights for a model of any size, drawn once: a full-size one takes seconds."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}
    for key, value in architecture.empty().state_dict().items():
        if value.ndim >= 2:
            state[key] = torch.randn(value.shape, generator=generator) * (1.5 * value[0].numel() ** -0.5)
        else:
            state[key] = torch.full(value.shape, float(key.endswith("weight")))
    return state


def write_tiny_clip(
    path: Path,
    config: dict[str, Any] | None = None,
    *,
    seed: int = 0,
    bias: float | None = -2.0,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write a tiny model as a file that says its own architecture, its token embedding compact; returns the path."""
    state = tiny_network(config, seed=seed, bias=bias).state_dict()
    save_clip(path, state, {"open_clip": config or CLIP, **PREPROCESS}, ids=range(49152, 49408), dtype=dtype)
    return path
