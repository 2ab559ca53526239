"""JPEG file size as a reward: small files, large files, and the true size to check them against. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from alignprop_core.hookspecs import hookimpl
from alignprop_core.specs import RewardSpec

_SOURCE = "https://www.w3.org/Graphics/JPEG/itu-t81.pdf"
_CITATION = "Black et al., Training Diffusion Models with Reinforcement Learning (DDPO), arXiv:2305.13301"


@hookimpl
def alignprop_register_rewards() -> Iterable[RewardSpec]:
    """Offer the two directions of the size estimate and the true measure."""
    return [
        RewardSpec(
            name="jpeg_compressibility",
            summary="Small JPEG files: minus the estimated size in kilobytes (of 1000 bytes).",
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
            summary="Large JPEG files, full of detail: the estimated size in kilobytes (of 1000 bytes).",
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
            summary="True JPEG file size as Pillow writes it; a measure: smaller files score lower.",
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
