"""The hpsv2 reward: cosine similarity of image and prompt under a CLIP-H fine-tuned on human preferences."""

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
from alignprop_hpsv2.config import Hpsv2Config
from alignprop_hpsv2.published import DEFAULT_VERSION, WEIGHTS


class Hpsv2(EncoderReward):
    """Human Preference Score v2 (arXiv:2306.09341).

    score = cos(f(image), g(prompt)) with CLIP ViT-H-14 fine-tuned on HPD v2, without logit scale and factor of 100.
    Typical images score 0.24 to 0.28 (version 2.0) and 0.15 to 0.31 (2.1); scores above 0.35 (2.0) and 0.40 (2.1)
    are over-optimized.

    The official preprocessing resizes the longest side to 224 px and pads with black. Like the original, it works on
    floating-point pixels and does not clip the overshoot of bicubic interpolation. The model is built from open_clip's
    config; no base checkpoint is fetched.

    Reference: https://github.com/tgxs002/HPSv2

    Args:
        config: the options; defaults if None.

    Raises:
        WeightsError: the weights are not on this machine, are of the other version, or belong to another model.
    """

    Config: ClassVar[type[RewardConfig]] = Hpsv2Config
    config: Hpsv2Config

    def __init__(self, config: Hpsv2Config | None = None) -> None:
        super().__init__(config)
        file = WEIGHTS[self.config.version]
        weights = self.config.weights
        if weights == "default" and self.config.version != DEFAULT_VERSION:
            # `alignprop rewards fetch hpsv2` fetches another file, so the error for a missing file must name this one.
            weights = f"hub:{file.repository}/{file.file}"
        path = find_weights(weights, reward="hpsv2", default=file)
        self._check_version(path)
        architecture = Architecture.from_name("ViT-H-14", pretrained="laion2b_s32b_b79k")
        self.encoder = load_clip(path, architecture, precision=self.config.precision)
        resize = "longest" if self.config.preprocessing == "official" else "shortest"
        self.encoder.preprocess = replace(self.encoder.preprocess, resize=resize, clip=False)  # type: ignore[arg-type]

    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) cosine similarities; float32, or float64 if the images are."""
        return cosine(self.encoder, batch)

    def _check_version(self, path: Path) -> None:
        """Raise `WeightsError` if the file is named like the other version, whose tensors have the same shapes."""
        for version, file in WEIGHTS.items():
            if path.name == file.file and version != self.config.version:
                raise WeightsError(
                    f"hpsv2: {path} contains version {version}, but the options set version {self.config.version}. Set "
                    f'version: "{version}", or set weights to {WEIGHTS[self.config.version].file}.'
                )
