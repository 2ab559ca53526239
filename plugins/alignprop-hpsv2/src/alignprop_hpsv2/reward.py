"""The hpsv2 reward: cosine of picture and prompt under CLIP-H, fine-tuned on human choices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from alignprop_clip.architecture import Architecture
from alignprop_clip.encoder import load_clip
from alignprop_clip.reward import EncoderReward, cosine
from alignprop_core.errors import WeightsError
from alignprop_core.reward import ImageBatch
from alignprop_core.specs import RewardConfig
from alignprop_core.weights import find_weights
from alignprop_hpsv2.config import DEFAULT_VERSION, WEIGHTS, Hpsv2Config


class Hpsv2(EncoderReward):
    """Human Preference Score v2 (arXiv:2306.09341).

    score = cos(f(image), g(prompt)) with CLIP ViT-H-14 fine-tuned on HPD v2: no logit scale, no factor of 100. Usual
    pictures lie at 0.24 to 0.28 (2.0) and 0.15 to 0.31 (2.1); above 0.35 is over-optimised.

    Official preprocessing scales the longest side to 224 and pads with black; both are done on floating-point pixels
    and without clipping what bicubic overshoots, as the original does. The model is built from open_clip's config; no
    base checkpoint is fetched.
    """

    Config: ClassVar[type[RewardConfig]] = Hpsv2Config
    config: Hpsv2Config

    def __init__(self, config: Hpsv2Config | None = None) -> None:
        super().__init__(config)
        file = WEIGHTS[self.config.version]
        weights = self.config.weights
        if weights == "default" and self.config.version != DEFAULT_VERSION:
            # Not the file `alignprop rewards fetch hpsv2` brings, so the message names this one.
            weights = f"hub:{file.repository}/{file.file}"
        path = find_weights(weights, reward="hpsv2", default=file)
        self._check_version(path)
        self.encoder = load_clip(path, Architecture.named("ViT-H-14"), precision=self.config.precision)
        resize = "longest" if self.config.preprocessing == "official" else "shortest"
        self.encoder.preprocess = replace(self.encoder.preprocess, resize=resize, clip=False)  # type: ignore[arg-type]

    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) cosines; float32, or float64 if the images are."""
        return cosine(self.encoder, batch)

    def _check_version(self, path: Path) -> None:
        """Both versions fit the same model, so only the published file name tells them apart."""
        for version, file in WEIGHTS.items():
            if path.name == file.file and version != self.config.version:
                raise WeightsError(
                    f"hpsv2: {path} holds version {version}, the options ask for {self.config.version}. Set version: "
                    f'"{version}", or name {WEIGHTS[self.config.version].file}.'
                )
