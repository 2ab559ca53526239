"""The aesthetic reward: a rating computed from a CLIP image embedding."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from alignprop_aesthetic.config import AestheticConfig
from alignprop_aesthetic.head import read_head
from alignprop_aesthetic.published import HEAD_WEIGHTS
from alignprop_clip.architecture import Architecture
from alignprop_clip.encoder import load_clip
from alignprop_clip.pretrained import CLIP_SCORE_WEIGHTS
from alignprop_clip.reward import EncoderReward
from alignprop_core.errors import WeightsError
from alignprop_core.reward import ImageBatch
from alignprop_core.specs import RewardConfig
from alignprop_core.weights import find_weights, load_state_dict, read_header


class Aesthetic(EncoderReward):
    """LAION's aesthetic predictor v2: the rating from 1 to 10 that people would give an image.

    score = head(e / |e|), where e is the projected image embedding of OpenAI's CLIP ViT-L/14 (with QuickGELU, which its
    weights require). Images are resized to 224 px (bicubic, shortest side) and center-cropped. The linear head is an
    affine function of the unit embedding, about 5.2 + 18 cos(w, e). It never saturates, so it is easily over-optimized:
    set a ceiling. Prompts are not used.

    Reference: https://github.com/christophschuhmann/improved-aesthetic-predictor

    Args:
        config: the options; defaults if None.

    Raises:
        WeightsError: head or CLIP weights are not on this machine, are of another format, or do not belong together.
    """

    Config: ClassVar[type[RewardConfig]] = AestheticConfig
    config: AestheticConfig

    def __init__(self, config: AestheticConfig | None = None) -> None:
        super().__init__(config)
        path = find_weights(self.config.weights, reward="aesthetic", default=HEAD_WEIGHTS)
        header = read_header(path)
        self.head = read_head(load_state_dict(path), str(path), self.config.activation, published=not header)

        clip_weights = self.config.clip_weights
        if clip_weights == "default":
            clip_weights = str(header.get("clip", "default"))
        # Named sets of CLIP weights are registered for clip_score.
        clip_path = find_weights(
            clip_weights, reward="aesthetic", default=CLIP_SCORE_WEIGHTS, option="clip_weights", sets_of="clip_score"
        )
        self.encoder = load_clip(
            clip_path,
            Architecture.from_name("ViT-L-14", pretrained="openai"),
            images_only=True,
            precision=self.config.precision,
        )
        if self.encoder.embed_dim != self.head.width:
            raise WeightsError(
                f"aesthetic: the head {path} takes embeddings of size {self.head.width}, but the CLIP model "
                f"{clip_path} returns size {self.encoder.embed_dim}. Set weights and clip_weights to files that belong "
                "together."
            )

    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) ratings; float32, or float64 if the images are."""
        ratings: Tensor = self.head(self.encoder.images(batch.images))
        return ratings
