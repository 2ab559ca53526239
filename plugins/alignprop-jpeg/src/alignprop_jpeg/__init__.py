"""JPEG file size rewards: estimated size in both directions, and true size as a measure. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from alignprop_core.hookspecs import hookimpl
from alignprop_core.specs import RewardSpec

_SOURCE = "https://www.w3.org/Graphics/JPEG/itu-t81.pdf"
_CITATION = "Black et al., Training Diffusion Models with Reinforcement Learning (DDPO), arXiv:2305.13301"


@hookimpl
def alignprop_register_rewards() -> Iterable[RewardSpec]:
    """Return the specs of both differentiable rewards and of the true file size."""
    return [
        RewardSpec(
            name="jpeg_compressibility",
            summary="Small JPEG files: negative estimated size in kilobytes (1 kB = 1000 bytes).",
            factory="alignprop_jpeg.reward:JpegCompressibility",
            config="alignprop_jpeg.config:CompressibilityConfig",
            unit="-kB",
            typical_range=(-200.0, -1.0),
            evaluate_with=("jpeg_bytes",),
            source=_SOURCE,
            citation=_CITATION,
            license="Apache-2.0",
        ),
        RewardSpec(
            name="jpeg_incompressibility",
            summary="Large JPEG files, rich in detail: estimated size in kilobytes (1 kB = 1000 bytes).",
            factory="alignprop_jpeg.reward:JpegIncompressibility",
            config="alignprop_jpeg.config:IncompressibilityConfig",
            unit="kB",
            typical_range=(1.0, 200.0),
            evaluate_with=("jpeg_bytes",),
            source=_SOURCE,
            citation=_CITATION,
            license="Apache-2.0",
        ),
        RewardSpec(
            name="jpeg_bytes",
            summary="True size in bytes of the JPEG file that Pillow writes; a measure: smaller files score lower.",
            factory="alignprop_jpeg.reward:JpegBytes",
            config="alignprop_jpeg.config:BytesConfig",
            differentiable=False,
            unit="bytes",
            typical_range=(1000.0, 200000.0),
            source="https://python-pillow.org",
            citation=_CITATION,
            license="Apache-2.0",
        ),
    ]
