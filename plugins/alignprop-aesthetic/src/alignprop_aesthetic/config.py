"""Options of the aesthetic reward, and its published head. Importing this module imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from alignprop_clip.config import ClipConfig
from alignprop_core.specs import WeightsFile

HEAD_WEIGHTS = WeightsFile(
    repository="camenduru/improved-aesthetic-predictor",
    file="sac+logos+ava1-l14-linearMSE.pth",
    sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    bytes=3_714_759,
    license="Apache-2.0",
)
"""A mirror on the hub; the checksum is that of the file in the author's repository."""


class AestheticConfig(ClipConfig):
    """Options of `aesthetic`."""

    weights: str = Field(
        default="default",
        description='The head: "default" (LAION\'s sac+logos+ava1), "starter", a local file, or hub:owner/name/file.',
    )
    clip_weights: str = Field(
        default="default",
        description='The CLIP model: "default" (stored in the head, else OpenAI\'s ViT-L/14), a named set, or a file.',
    )
    activation: Literal["none", "relu"] = Field(
        default="none",
        description='Activation between the layers of the head: "none" (linearMSE heads) or "relu" (reluMSE heads).',
    )
