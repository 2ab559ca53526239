"""Options of the CLIP rewards. Importing this module imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from alignprop_core.specs import RewardConfig


class TowerConfig(RewardConfig):
    """What all rewards on a CLIP model share."""

    weights: str = Field(
        default="default",
        description='Weights: "default" (the published ones), "starter", a local file, or hub:owner/name/file.',
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Arithmetic inside the model. float32 is exact; bfloat16 (autocast) is faster on a GPU.",
    )


class ModelConfig(TowerConfig):
    """A reward whose model can be chosen."""

    model: str = Field(
        default="ViT-L-14",
        description="open_clip model name, such as ViT-L-14. A weights file that says its own architecture decides.",
    )
    quick_gelu: bool | None = Field(
        default=None,
        description="QuickGELU activation, as OpenAI's weights need; null: as the weights or the model have it.",
    )


class ClipScoreConfig(ModelConfig):
    """Options of `clip_score`."""


class PickScoreConfig(TowerConfig):
    """Options of `pickscore`."""


class SiglipScoreConfig(ModelConfig):
    """Options of `siglip_score`."""

    model: str = Field(
        default="ViT-B-16-SigLIP",
        description="open_clip SigLIP model name. A weights file that says its own architecture decides.",
    )
    output: Literal["logit", "log_probability"] = Field(
        default="logit",
        description='"logit" has the same slope everywhere; "log_probability" (log sigmoid of it) levels off at 0.',
    )


class ReferenceSimilarityConfig(ModelConfig):
    """Options of `reference_similarity`."""

    folder: str = Field(
        min_length=1,
        description="Folder of pictures to move towards; written ./like/this it is looked for beside the run config.",
    )
    compare: Literal["mean", "max"] = Field(
        default="mean", description="Mean of the cosines to all pictures, or the largest: the nearest picture alone."
    )
