"""Images for tests: crops of photographs in this package, and scenes of the starter plugin."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.resources import files

import torch
from torch import Tensor

PHOTOGRAPHS = ("astronaut", "cat", "coffee", "rocket")
"""128x128 crops of public-domain photographs (NASA, CC0) from scikit-image's collection."""


@cache
def _photographs() -> Tensor:
    import numpy as np
    from PIL import Image

    images = []
    for name in PHOTOGRAPHS:
        with files("alignprop_core.testing").joinpath(f"photographs/{name}.webp").open("rb") as stream:
            images.append(np.array(Image.open(stream).convert("RGB")))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def natural_images(count: int = 3, height: int = 64, width: int = 64) -> Tensor:
    """Return crops of photographs: (count, 3, height, width) float32, always the same.

    Each is the largest center crop of a 128x128 photograph with that aspect ratio, resized. Values are within 0.02 to
    0.98, so that small steps in any direction stay inside [0, 1].
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
    """Return scenes like those the starter model generates, and captions; needs the plugin alignprop-starter.

    Returns:
        (count, 3, 128, 128) float32 in [0, 1], and one caption per image ("three foxes on a blue background").
    """
    scenes = import_module("alignprop_starter.scenes").render_scenes(count, seed=seed)
    return scenes.images, list(scenes.captions())
