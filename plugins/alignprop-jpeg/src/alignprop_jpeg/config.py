"""Options of the JPEG rewards. Importing this module imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from alignprop_core.specs import RewardConfig


class JpegConfig(RewardConfig):
    """How the picture is saved; shared by all three rewards, so a measure follows the term it stands beside."""

    quality: int = Field(
        default=95,
        ge=1,
        le=95,
        strict=True,
        description="JPEG quality as in Pillow and libjpeg, 1 to 95; DDPO uses 95. Lower quality, coarser tables.",
    )
    subsampling: Literal["4:2:0", "4:4:4"] = Field(
        default="4:2:0",
        description='Chroma subsampling. "4:2:0" (half the resolution each way) is Pillow\'s default at every quality.',
    )


class CompressibilityConfig(JpegConfig):
    """Options of `jpeg_compressibility`."""


class IncompressibilityConfig(JpegConfig):
    """Options of `jpeg_incompressibility`."""


class BytesConfig(JpegConfig):
    """Options of `jpeg_bytes`."""
