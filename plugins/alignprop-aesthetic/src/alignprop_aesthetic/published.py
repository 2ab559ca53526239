"""The published head of the aesthetic predictor. Imports no torch."""

from __future__ import annotations

from alignprop_core.specs import WeightsFile

HEAD_WEIGHTS = WeightsFile(
    repository="camenduru/improved-aesthetic-predictor",
    file="sac+logos+ava1-l14-linearMSE.pth",
    sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    bytes=3_714_759,
    license="Apache-2.0",
)
"""A mirror on the hub; the checksum is that of the file in the author's repository."""
