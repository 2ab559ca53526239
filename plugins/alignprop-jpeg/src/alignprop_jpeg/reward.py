"""The JPEG rewards: estimated size in both directions, with a gradient; and the true size, without."""

from __future__ import annotations

import io
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from alignprop_core.reward import ImageBatch, Reward
from alignprop_core.specs import RewardConfig
from alignprop_jpeg.config import BytesConfig, CompressibilityConfig, IncompressibilityConfig, JpegConfig
from alignprop_jpeg.size_model import jpeg_size


class _EstimatedSize(Reward):
    """The size estimate in kilobytes of 1000 bytes, times `sign`."""

    sign: ClassVar[float]
    Config: ClassVar[type[RewardConfig]] = JpegConfig
    config: JpegConfig

    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) plus or minus kilobytes; float32, or float64 if the images are."""
        size = jpeg_size(batch.images, self.config.quality, self.config.subsampling)
        return size * (self.sign / 1000)


class JpegCompressibility(_EstimatedSize):
    """Minus the estimated JPEG size in kilobytes of 1000 bytes: higher is better, smaller files score higher.

    score = -size(images) / 1000 with `alignprop_jpeg.size_model.jpeg_size`. A 512x512 photograph at quality 95 scores
    about -100, a flat picture about -5. The field's name and unit are DDPO's (arXiv:2305.13301).
    """

    sign = -1.0
    Config: ClassVar[type[RewardConfig]] = CompressibilityConfig


class JpegIncompressibility(_EstimatedSize):
    """The estimated JPEG size in kilobytes of 1000 bytes: larger files score higher.

    Grows without bound in sight (noise is the largest picture of all): give it a `ceiling` in the run config.
    """

    sign = 1.0
    Config: ClassVar[type[RewardConfig]] = IncompressibilityConfig


class JpegBytes(Reward):
    """True size in bytes of the JPEG file Pillow writes: a plain measure without a gradient, for evaluations.

    Pixels are clipped to [0, 1] and rounded to 8 bits, as saving a picture does. It is a measure of the file and takes
    no side: smaller files score *lower*. Beside `jpeg_compressibility` a falling value is a success.
    """

    Config: ClassVar[type[RewardConfig]] = BytesConfig
    config: BytesConfig

    @torch.no_grad()
    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) bytes; float32 (exact up to 16 MiB), or float64 if the images are."""
        dtype = torch.float64 if batch.images.dtype == torch.float64 else torch.float32
        pixels = (batch.images.detach().to(dtype).clamp(0, 1) * 255).round().to(torch.uint8)
        sizes = [self._file_size(picture.permute(1, 2, 0).contiguous().cpu().numpy()) for picture in pixels]
        return torch.tensor(sizes, dtype=dtype, device=batch.images.device)

    def _file_size(self, pixels: object) -> int:
        file = io.BytesIO()
        picture = Image.fromarray(pixels)  # type: ignore[arg-type]
        picture.save(file, "JPEG", quality=self.config.quality, subsampling=self.config.subsampling)
        return file.tell()
