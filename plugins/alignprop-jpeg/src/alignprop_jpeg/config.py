"""Options of the JPEG rewards. Importing this module imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from alignprop_core.specs import RewardConfig


class JpegConfig(RewardConfig):
    """Encoder settings, shared by all three rewards, so that `jpeg_bytes` measures what the trained term estimates."""

    quality: int = Field(
        default=95,
        ge=1,
        le=95,
        strict=True,
        description="JPEG quality as in Pillow and libjpeg (1 to 95). Lower values are coarser; DDPO uses 95.",
    )
    subsampling: Literal["4:2:0", "4:4:4"] = Field(
        default="4:2:0",
        description='Chroma subsampling. "4:2:0" (half the resolution in both directions) is Pillow\'s default.',
    )


class CompressibilityConfig(JpegConfig):
    """Options of `jpeg_compressibility`."""


class IncompressibilityConfig(JpegConfig):
    """Options of `jpeg_incompressibility`."""


class BytesConfig(JpegConfig):
    """Options of `jpeg_bytes`."""
