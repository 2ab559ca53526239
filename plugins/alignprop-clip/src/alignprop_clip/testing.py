"""Tiny CLIP models with random weights and a batch of random images, for the tests of rewards on CLIP models."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignprop_clip.architecture import Architecture
from alignprop_clip.checkpoint import save_clip
from alignprop_core.reward import ImageBatch

PROMPTS = ["three foxes on a blue background", "a cat", "", "two dogs"]

IMAGE_SIZE = 32
CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": IMAGE_SIZE, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
"""open_clip model config of a tiny model: a forward pass takes about a millisecond."""

PREPROCESS: dict[str, Any] = {
    "image_size": IMAGE_SIZE,
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
}


def tiny_network(config: dict[str, Any] | None = None, *, seed: int = 0, bias: float | None = -2.0) -> nn.Module:
    """Build an open_clip model with random weights, large enough for scores to differ between images.

    Args:
        config: open_clip's model config; `CLIP` if None.
        seed: seed of the weights.
        bias: the logit bias; None for a model without one.
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
    """Return a random state dict for a model of any size, generated directly: a full-size model takes seconds."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}
    for key, value in architecture.build_empty().state_dict().items():
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
    """Write a tiny model to a file whose header stores its architecture, with a compact token embedding.

    Args:
        path: the .safetensors file to write.
        config: open_clip's model config; `CLIP` if None.
        seed: seed of the weights.
        bias: the logit bias; None for a model without one.
        dtype: storage dtype.

    Returns:
        `path`.
    """
    state = tiny_network(config, seed=seed, bias=bias).state_dict()
    save_clip(path, state, {"open_clip": config or CLIP, **PREPROCESS}, ids=range(49152, 49408), dtype=dtype)
    return path


def random_batch(size: int = 4, height: int = 48, width: int = 70, dtype: torch.dtype = torch.float32) -> ImageBatch:
    """Return a batch of random images, the same at every call, with the prompts of `PROMPTS` in turn.

    Args:
        size: number of images B.
        height: of each image, in pixels.
        width: of each image, in pixels.
        dtype: floating-point dtype of the (B, 3, height, width) images; the values are in [0, 1).
    """
    images = torch.rand(size, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ImageBatch(images=images.to(dtype), prompts=[PROMPTS[i % len(PROMPTS)] for i in range(size)])
