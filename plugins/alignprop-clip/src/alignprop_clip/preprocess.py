"""From pictures of any size to what a CLIP model was trained on, with a gradient at every step."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Resize = Literal["shortest", "longest", "squash"]


@dataclass(frozen=True)
class Preprocess:
    """Resize, crop or pad to a square, subtract the mean, divide by the standard deviation.

    Resizing is antialiased (`F.interpolate(antialias=True)`): the filter Pillow uses, and torchvision on tensors.
    Pillow's own result is rounded to 8 bits twice; this is not, so values differ by a grey level at most.

    Attributes:
        size: side of the square in pixels.
        mean: of each channel, subtracted.
        std: of each channel, divided by.
        resize: "shortest": the shortest side becomes `size`, the centre is cut out. "longest": the longest side
            becomes `size`, the rest is black. "squash": both sides become `size`.
        interpolation: the filter.
        clip: bring what bicubic overshoots back into [0, 1], as 8-bit pictures do. The gradient passes through
            unchanged: in a white area half the pixels overshoot by rounding alone, and would stop learning.
        crop: where the middle begins when there are an odd number of pixels too many: "nearest", halves to even, as
            torchvision and open_clip do it, or "floor", as transformers does.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize = "shortest"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    clip: bool = True
    crop: Literal["nearest", "floor"] = "nearest"

    def __call__(self, images: Tensor) -> Tensor:
        """Prepare pictures.

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            (B, 3, size, size), float32; float64 if the images are.
        """
        x = images if images.dtype == torch.float64 else images.float()
        height, width = self._resized(*x.shape[-2:])
        if (height, width) != tuple(x.shape[-2:]):
            x = self._scale(x, height, width)
        if self.resize == "shortest":
            begin = floor if self.crop == "floor" else round
            top, left = begin((height - self.size) / 2), begin((width - self.size) / 2)
            x = x[..., top : top + self.size, left : left + self.size]
        elif self.resize == "longest":
            down, right = self.size - height, self.size - width
            x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
        return (x - self._channels(self.mean, x)) / self._channels(self.std, x)

    def _scale(self, x: Tensor, height: int, width: int) -> Tensor:
        if not self.clip:
            return F.interpolate(x, (height, width), mode=self.interpolation, align_corners=False, antialias=True)
        # Pillow scales rows first, then columns, and its 8-bit pixels are clipped after each: at hard edges clipping
        # once, at the end, is up to twenty grey levels off. (From version 13 the side that shrinks more goes first;
        # that is the same wherever the aspect is kept.)
        for size in ((x.shape[-2], width), (height, width)):
            x = F.interpolate(x, size, mode=self.interpolation, align_corners=False, antialias=True)
            x = x + (x.clamp(0, 1) - x).detach()
        return x

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the size before cropping or padding, rounded as the originals do: down, or to the nearest."""
        if self.resize == "squash":
            return self.size, self.size
        if self.resize == "longest":
            scale = self.size / float(max(height, width))
            # A side is never rounded away, however long the picture.
            return max(1, round(height * scale)), max(1, round(width * scale))
        if height <= width:
            return self.size, int(self.size * width / height)
        return int(self.size * height / width), self.size

    @staticmethod
    def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)
