"""Differentiable CLIP preprocessing: resize, crop or pad to a square, normalize."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Resize = Literal["shortest", "longest", "squash"]


@dataclass(frozen=True)
class Preprocess:
    """Resize, crop or pad to a square, subtract the mean, divide by the standard deviation.

    Resizing is antialiased (`F.interpolate(antialias=True)`), with the filter that Pillow uses and torchvision uses for
    tensors. Pillow rounds its result to 8 bits twice; this class does not round, so pixel values differ by at most
    one gray level.

    Attributes:
        size: side of the square in pixels.
        mean: value subtracted from each channel.
        std: value that divides each channel.
        resize: "shortest": resize the shortest side to `size` and crop the center. "longest": resize the longest side
            to `size` and pad with black. "squash": resize both sides to `size`.
        interpolation: the resampling filter.
        clip: clip the overshoot of bicubic interpolation to [0, 1], as 8-bit images do, with a straight-through
            gradient. Without it, half the pixels of a white area, which overshoot by rounding alone, would get no
            gradient.
        crop: start of the center crop when the margin is odd: "nearest" rounds half to even, as torchvision and
            open_clip do; "floor" rounds down, as transformers does.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize = "shortest"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    clip: bool = True
    crop: Literal["nearest", "floor"] = "nearest"

    def __call__(self, images: Tensor) -> Tensor:
        """Preprocess images.

        Args:
            images: (B, 3, H, W) in [0, 1], any floating-point dtype.

        Returns:
            (B, 3, size, size), float32; float64 if the images are.
        """
        x = images if images.dtype == torch.float64 else images.float()
        height, width = self._resized_shape(*x.shape[-2:])
        if (height, width) != tuple(x.shape[-2:]):
            x = self._interpolate(x, height, width)  # (B, 3, height, width)
        if self.resize == "shortest":
            begin = floor if self.crop == "floor" else round
            top, left = begin((height - self.size) / 2), begin((width - self.size) / 2)
            x = x[..., top : top + self.size, left : left + self.size]
        elif self.resize == "longest":
            vertical, horizontal = self.size - height, self.size - width
            x = F.pad(x, (horizontal // 2, horizontal - horizontal // 2, vertical // 2, vertical - vertical // 2))
        return (x - self._per_channel(self.mean, x)) / self._per_channel(self.std, x)

    def describe(self) -> dict[str, Any]:
        """Return the preprocessing in words and numbers, as `alignprop rewards show NAME --options` prints it."""
        square = f"{self.size} x {self.size}"
        target = {"shortest": f"shorter side to {self.size}", "longest": f"longer side to {self.size}"}
        described: dict[str, Any] = {
            "resize": f"{target.get(self.resize, f'to {square}')}, {self.interpolation}, antialiased"
        }
        if self.resize == "shortest":
            described["crop"] = f"center, {square}"
        elif self.resize == "longest":
            described["pad"] = f"black, to {square}"
        return {**described, "mean": list(self.mean), "std": list(self.std)}

    def _interpolate(self, x: Tensor, height: int, width: int) -> Tensor:
        if not self.clip:
            return F.interpolate(x, (height, width), mode=self.interpolation, align_corners=False, antialias=True)
        # Pillow scales rows first, then columns, and clips its 8-bit pixels after each pass. Clipping once, at the
        # end, is up to twenty gray levels off at hard edges. (Pillow 13 starts with the side that shrinks more; the
        # result is the same wherever the aspect ratio is kept.)
        for size in ((x.shape[-2], width), (height, width)):
            x = F.interpolate(x, size, mode=self.interpolation, align_corners=False, antialias=True)
            x = x + (x.clamp(0, 1) - x).detach()  # straight-through: value clipped, gradient unchanged
        return x

    def _resized_shape(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) before cropping or padding, with the rounding of the reference implementations."""
        if self.resize == "squash":
            return self.size, self.size
        if self.resize == "longest":
            scale = self.size / float(max(height, width))
            # At least one pixel, so that a very long image does not lose its short side.
            return max(1, round(height * scale)), max(1, round(width * scale))
        if height <= width:
            return self.size, int(self.size * width / height)
        return int(self.size * height / width), self.size

    @staticmethod
    def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
        """Return (3, 1, 1), broadcast over batch and pixels."""
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)
