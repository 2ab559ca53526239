"""The judge: a small classifier of the species, number, style and background of a 128x128 scene."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import as_file, files
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from alignprop_starter.vocabulary import BACKGROUNDS, MAX_NUMBER, SPECIES, STYLES

ATTRIBUTES = {"species": len(SPECIES), "number": MAX_NUMBER, "style": len(STYLES), "background": len(BACKGROUNDS)}


class _Block(nn.Module):
    """Residual block of two 3x3 convolutions that halves height and width."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride=2, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outside)
        self.second = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outside)
        self.shortcut = nn.Conv2d(inside, outside, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        return F.silu(y + self.shortcut(F.avg_pool2d(x, 2)))


class Judge(nn.Module):
    """Four linear classifiers on a shared convolutional network."""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 88, 112, 128)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.blocks = nn.Sequential(*(_Block(a, b) for a, b in pairwise(widths)))
        self.heads = nn.ModuleDict({name: nn.Linear(2 * widths[-1], count) for name, count in ATTRIBUTES.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the logits of each attribute.

        Args:
            images: (B, 3, 128, 128) in [0, 1]; other sizes are resized (bilinear, antialiased).

        Returns:
            `species` (B, 51), `number` (B, 4; class k means k + 1 animals), `style` (B, 3), `background` (B, 8).
        """
        if images.shape[-2:] != (128, 128):
            images = F.interpolate(images, size=(128, 128), mode="bilinear", antialias=True)
        x = self.blocks(F.silu(self.stem(images * 2 - 1)))
        # (B, 128, 8, 8) -> (B, 256): mean and maximum over positions.
        features = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, images: Tensor) -> dict[str, Tensor]:
        """Return the most likely class index of each attribute, (B,) each; `number` is the number itself, from 1."""
        seen = {name: logits.argmax(1) for name, logits in self(images).items()}
        return seen | {"number": seen["number"] + 1}


def read_judge(path: Path, device: str = "cpu") -> Judge:
    """Load weights (safetensors, float16 on disk) into a frozen float32 judge."""
    judge = Judge()
    judge.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in load_file(path).items()}
    )
    return judge.requires_grad_(False).eval().to(device)


@lru_cache(maxsize=2)
def load_judge(device: str = "cpu") -> Judge:
    """Return the judge of this package; loaded once per device."""
    with as_file(files("alignprop_starter") / "judge" / "judge.safetensors") as path:
        return read_judge(path, device)
