"""Options of the aesthetic reward. Importing this module imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from alignprop_clip.config import ClipConfig


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
