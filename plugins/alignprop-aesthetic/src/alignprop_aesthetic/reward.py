"""The aesthetic reward: a CLIP image embedding, rated by the head."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from alignprop_aesthetic.config import HEAD_WEIGHTS, AestheticConfig
from alignprop_aesthetic.head import read_head
from alignprop_clip.architecture import Architecture
from alignprop_clip.catalogue import CLIP_SCORE_WEIGHTS
from alignprop_clip.encoder import load_clip
from alignprop_clip.reward import EncoderReward
from alignprop_core.errors import WeightsError
from alignprop_core.reward import ImageBatch
from alignprop_core.specs import RewardConfig
from alignprop_core.weights import find_weights, load_state_dict, read_header


class Aesthetic(EncoderReward):
    """LAION's aesthetic predictor v2: the rating from 1 to 10 that people would give a picture.

    score = head(e / |e|), e the projected image embedding of OpenAI's CLIP ViT-L/14 (QuickGELU, as its weights need),
    picture resized to 224 (bicubic, shortest side) and cut in the middle. The linear head is an affine function of the
    unit embedding, about 5.2 + 18 cos(w, e): it rises as long as the picture can be turned towards w and never
    levels off, hence it is easily over-optimised. Give it a ceiling.
    """

    Config: ClassVar[type[RewardConfig]] = AestheticConfig
    config: AestheticConfig

    def __init__(self, config: AestheticConfig | None = None) -> None:
        super().__init__(config)
        path = find_weights(self.config.weights, reward="aesthetic", default=HEAD_WEIGHTS)
        header = read_header(path)
        self.head = read_head(load_state_dict(path), str(path), self.config.activation, published=not header)

        tower = self.config.clip_weights
        if tower == "default":
            tower = str(header.get("clip", "default"))
        # Named sets of CLIP weights are registered for clip_score.
        clip_path = find_weights(
            tower, reward="aesthetic", default=CLIP_SCORE_WEIGHTS, option="clip_weights", sets_of="clip_score"
        )
        self.encoder = load_clip(
            clip_path,
            Architecture.named("ViT-L-14", quick_gelu=True),
            images_only=True,
            precision=self.config.precision,
        )
        if self.encoder.embed_dim != self.head.width:
            raise WeightsError(
                f"aesthetic: the head {path} rates embeddings of {self.head.width} numbers, the CLIP model {clip_path} "
                f"gives {self.encoder.embed_dim}. They do not belong together: set weights and clip_weights to match."
            )

    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) ratings; float32, or float64 if the images are."""
        ratings: Tensor = self.head(self.encoder.images(batch.images))
        return ratings
