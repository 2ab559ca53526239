"""Options of the aesthetic reward, and its published head. Importing this module imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from alignprop_core.specs import RewardConfig, WeightsFile

HEAD_WEIGHTS = WeightsFile(
    repository="camenduru/improved-aesthetic-predictor",
    file="sac+logos+ava1-l14-linearMSE.pth",
    sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    bytes=3_714_759,
    license="Apache-2.0",
)
"""A mirror on the hub; the checksum is that of the file in the author's own repository."""


class AestheticConfig(RewardConfig):
    """Options of `aesthetic`."""

    weights: str = Field(
        default="default",
        description='The head: "default" (LAION\'s sac+logos+ava1), "starter", a local file, or hub:owner/name/file.',
    )
    clip_weights: str = Field(
        default="default",
        description='The CLIP model below it: "default" (what the head names, else OpenAI\'s ViT-L/14), a set, a file.',
    )
    activation: Literal["none", "relu"] = Field(
        default="none", description='Between the head\'s layers: "none" (linearMSE heads) or "relu" (reluMSE heads).'
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Arithmetic inside the CLIP model. float32 is exact; bfloat16 (autocast) is faster on a GPU.",
    )
