"""Pictures for tests: pieces of photographs that ship with this package, and scenes of the starter's world."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any, cast

import torch
from torch import Tensor

PHOTOGRAPHS = ("astronaut", "cat", "coffee", "rocket")
"""128x128 pieces of photographs in the public domain (NASA; CC0), as scikit-image collects them."""


@cache
def _photographs() -> Tensor:
    import numpy as np
    from PIL import Image

    pictures = []
    for name in PHOTOGRAPHS:
        with files("alignprop_core.testing").joinpath(f"photographs/{name}.webp").open("rb") as stream:
            pictures.append(np.array(Image.open(stream).convert("RGB")))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def natural_images(count: int = 3, height: int = 64, width: int = 64) -> Tensor:
    """Return pieces of photographs: (count, 3, height, width) float32, strictly inside [0, 1].

    The same every time. The larger side fills from a 128x128 piece, resized where it is larger or smaller; values stay
    within 0.02 to 0.98, so that a small step in any direction is no clipped one.
    """
    whole = _photographs()[[i % len(PHOTOGRAPHS) for i in range(count)]]
    flip = torch.tensor([i // len(PHOTOGRAPHS) % 2 for i in range(count)], dtype=torch.bool)
    whole = torch.where(flip[:, None, None, None], whole.flip(-1), whole)
    scale = 128 / max(height, width)
    tall, wide = min(128, max(1, round(height * scale))), min(128, max(1, round(width * scale)))
    top, left = (128 - tall) // 2, (128 - wide) // 2
    piece = whole[..., top : top + tall, left : left + wide]
    resized = torch.nn.functional.interpolate(piece, size=(height, width), mode="bilinear", antialias=True)
    return (0.02 + 0.96 * resized).clamp(0.02, 0.98)


def starter_images(count: int = 3, *, seed: int = 0) -> tuple[Tensor, list[str]]:
    """Return scenes as the starter model draws them, with their captions; needs the plugin alignprop-starter.

    Returns:
        (count, 3, 128, 128) float32 in [0, 1], and a caption each ("three foxes on a blue background").
    """
    from importlib import import_module

    scenes = cast(Any, import_module("alignprop_starter.scenes")).render_scenes(count, seed=seed)
    return scenes.images, list(scenes.captions())
