"""Options of the CLIP rewards. Importing this module imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from alignprop_core.specs import RewardConfig

Precision = Literal["float32", "bfloat16"]


class ClipConfig(RewardConfig):
    """Options shared by all rewards on a CLIP model."""

    weights: str = Field(
        default="default",
        description='Weights: "default" (the published weights), "starter", a local file, or hub:owner/name/file.',
    )
    precision: Precision = Field(
        default="float32",
        description="Arithmetic inside the CLIP model. float32 is exact; bfloat16 (autocast) is faster on a GPU.",
    )


class OpenClipConfig(ClipConfig):
    """Options of a reward that works with any contrastive open_clip model."""

    model: str = Field(
        default="ViT-L-14",
        description="open_clip model name, such as ViT-L-14. Ignored if the weights file stores its own architecture.",
    )
    pretrained: str | None = Field(
        default=None,
        min_length=1,
        description="open_clip's tag of the weights, such as laion2b_s32b_b82k: selects what default means, or tells "
        "which published weights a file comes from. null: recognized by the repository or the name of the file.",
    )
    quick_gelu: bool | None = Field(
        default=None,
        description="Use the QuickGELU activation, as OpenAI's weights require; null: the activation of the weights.",
    )


class ClipScoreConfig(OpenClipConfig):
    """Options of `clip_score`."""


class PickScoreConfig(ClipConfig):
    """Options of `pickscore`."""


class SiglipScoreConfig(OpenClipConfig):
    """Options of `siglip_score`."""

    model: str = Field(
        default="ViT-B-16-SigLIP",
        description="open_clip SigLIP model name. Ignored if the weights file stores its own architecture.",
    )
    output: Literal["logit", "log_probability"] = Field(
        default="logit",
        description='"logit" has a constant slope; "log_probability" (log sigmoid of the logit) saturates at 0.',
    )


class ReferenceSimilarityConfig(OpenClipConfig):
    """Options of `reference_similarity`."""

    folder: str = Field(
        min_length=1,
        description="Folder of reference images; a path that starts with ./ is relative to the run config.",
    )
    compare: Literal["mean", "max"] = Field(
        default="mean",
        description='Aggregation over the reference images: "mean" cosine similarity, or "max" (the nearest image).',
    )
