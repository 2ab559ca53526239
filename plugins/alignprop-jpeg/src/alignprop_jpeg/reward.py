"""The JPEG rewards: differentiable size estimates in both directions, and the true file size."""

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
    """score = sign * size / 1000, with the size in bytes estimated by `jpeg_size`."""

    sign: ClassVar[float]
    Config: ClassVar[type[RewardConfig]] = JpegConfig
    config: JpegConfig

    def score(self, batch: ImageBatch) -> Tensor:
        """Return signed kilobytes, shape (B,); float32, or float64 if the images are float64."""
        size = jpeg_size(batch.images, self.config.quality, self.config.subsampling)
        return size * (self.sign / 1000)


class JpegCompressibility(_EstimatedSize):
    """Negative estimated JPEG size in kilobytes (1 kB = 1000 bytes): smaller files score higher.

    score = -jpeg_size(images) / 1000, see `alignprop_jpeg.size_model.jpeg_size`. At quality 95 a 512x512 photograph
    scores about -100 and a flat image about -5. The name and the unit follow DDPO (arXiv:2305.13301).
    """

    sign = -1.0
    Config: ClassVar[type[RewardConfig]] = CompressibilityConfig


class JpegIncompressibility(_EstimatedSize):
    """Estimated JPEG size in kilobytes (1 kB = 1000 bytes): larger files score higher.

    Noise scores highest, so set a `ceiling` for this term in the run config.
    """

    sign = 1.0
    Config: ClassVar[type[RewardConfig]] = IncompressibilityConfig


class JpegBytes(Reward):
    """True size in bytes of the JPEG file that Pillow writes; no gradient, for evaluation only.

    Pixels are clipped to [0, 1] and rounded to 8 bits, as when an image is saved. Smaller files score *lower*: when
    this is reported next to `jpeg_compressibility`, a decrease is an improvement.
    """

    Config: ClassVar[type[RewardConfig]] = BytesConfig
    config: BytesConfig

    @torch.no_grad()
    def score(self, batch: ImageBatch) -> Tensor:
        """Return bytes, shape (B,); float32 (exact up to 16 MiB), or float64 if the images are float64."""
        dtype = torch.float64 if batch.images.dtype == torch.float64 else torch.float32
        pixels = (batch.images.detach().to(dtype).clamp(0, 1) * 255).round().to(torch.uint8)
        # Pillow takes (H, W, 3) bytes on the CPU, one image at a time.
        sizes = [self._file_size(image.permute(1, 2, 0).contiguous().cpu().numpy()) for image in pixels]
        return torch.tensor(sizes, dtype=dtype, device=batch.images.device)

    def _file_size(self, pixels: object) -> int:
        file = io.BytesIO()
        image = Image.fromarray(pixels)  # type: ignore[arg-type]
        image.save(file, "JPEG", quality=self.config.quality, subsampling=self.config.subsampling)
        return file.tell()
