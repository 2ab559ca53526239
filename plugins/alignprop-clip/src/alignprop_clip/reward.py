"""Rewards that compare an image with its prompt: clip_score, pickscore, siglip_score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from alignprop_clip.architecture import Architecture
from alignprop_clip.config import ClipScoreConfig, OpenClipConfig, PickScoreConfig, SiglipScoreConfig
from alignprop_clip.encoder import ClipEncoder, load_clip
from alignprop_clip.folder_settings import settings_beside
from alignprop_clip.pretrained import PICKSCORE_WEIGHTS, PRETRAINED, PRETRAINED_SIGLIP, Pretrained
from alignprop_clip.published import hub_files, tags
from alignprop_core.errors import ConfigError, WeightsError
from alignprop_core.reward import ImageBatch, Reward
from alignprop_core.specs import RewardConfig
from alignprop_core.weights import find_weights
from alignprop_core.weights.find import cached, parse_hub_file


def load_encoder(
    config: OpenClipConfig, reward: str, *, images_only: bool = False, defaults: Mapping[str, Pretrained] = PRETRAINED
) -> ClipEncoder:
    """Load the CLIP model that a reward's options select.

    Args:
        config: the options.
        reward: name of the reward, for named weight sets and messages.
        images_only: load the image tower only.
        defaults: the models that have "default" weights, for this reward.

    Raises:
        ConfigError: open_clip has no such model, the model is not supported, or it has no default weights.
        WeightsError: the weights are not on this machine, or belong to another model.
    """
    model = config.model.replace("/", "-")
    weights, pretrained, default = config.weights, config.pretrained, defaults.get(model)
    if weights == "default" and default is not None and pretrained is None:
        pretrained = default.tag
    # Before looking for weights, so that a misspelled model is reported as such.
    architecture = Architecture.from_name(model, pretrained=pretrained, weights=weights, quick_gelu=config.quick_gelu)
    if weights == "default" and (default is None or pretrained != default.tag):
        if pretrained is None:
            raise ConfigError(
                f'Reward "{reward}" has no default weights for the model {config.model}. Set weights: PATH or weights: '
                f"hub:owner/name/file, set pretrained to one of open_clip's tags ({', '.join(tags(model)) or 'none'}), "
                f"or choose a model that has defaults: {', '.join(defaults)}."
            )
        weights = _cached_file(hub_files(model, pretrained))
    elif weights == "default" and default is not None and model != type(config).model_fields["model"].default:
        # `alignprop rewards fetch NAME` fetches another file, so the error for a missing file must name this one.
        weights = f"hub:{default.weights.repository}/{default.weights.file}"
    path = find_weights(weights, reward=reward, default=default.weights if default is not None else None)
    recognized = architecture.settings is not None and architecture.settings.recognized
    if not recognized and (stored := settings_beside(path)) is not None:
        architecture = architecture.with_settings(stored, quick_gelu=config.quick_gelu)
    return load_clip(
        path, architecture, images_only=images_only, precision=config.precision, quick_gelu=config.quick_gelu
    )


def _cached_file(files: Sequence[str]) -> str:
    """Return the first of the hub files that is on this machine, else the last, which every repository has."""
    return next((file for file in files if cached(parse_hub_file(file)) is not None), files[-1])


def cosine(encoder: ClipEncoder, batch: ImageBatch) -> Tensor:
    """Return (B,) cosine similarities of images and their prompts; float32, float64 if the images are."""
    images = encoder.images(batch.images)  # (B, D) unit vectors
    return (images * encoder.prompts(batch.prompts).to(images)).sum(-1)


class EncoderReward(Reward):
    """Base class of rewards on a CLIP model. A subclass sets `encoder` in `__init__` and implements `score`."""

    encoder: ClipEncoder

    def image_features(self, images: Tensor) -> Tensor:
        """Embed images with the reward's encoder; used by `evaluation.diversity_encoder`.

        Args:
            images: (B, 3, H, W) in [0, 1], any size, any floating-point dtype.

        Returns:
            (B, D) unit vectors, float32 (float64 if the images are), differentiable with respect to the pixels.
        """
        return self.encoder.images(images)

    def describe_preprocessing(self) -> dict[str, Any]:
        """Return resizing, cropping, normalization and activation of the CLIP model."""
        return {**self.encoder.preprocess.describe(), "activation": self.encoder.activation}


class ClipScore(EncoderReward):
    """Cosine similarity of image and text embeddings under a CLIP model (arXiv:2103.00020).

    score = cos(f(image), g(prompt)), in [-1, 1]. Matching photographs score about 0.25 to 0.35 with ViT-L-14.
    CLIPScore (arXiv:2104.08718) is 2.5 max(score, 0); some libraries multiply by 100. Any contrastive open_clip model
    with open_clip's own text tower works.

    Args:
        config: the options; defaults if None.

    Raises:
        ConfigError: the model is unknown, not supported, or has no default weights.
        WeightsError: the weights are not on this machine, or belong to another model.
    """

    Config: ClassVar[type[RewardConfig]] = ClipScoreConfig
    config: ClipScoreConfig

    def __init__(self, config: ClipScoreConfig | None = None) -> None:
        super().__init__(config)
        self.encoder = load_encoder(self.config, "clip_score")

    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) cosine similarities; float32, or float64 if the images are."""
        return cosine(self.encoder, batch)


class PickScore(EncoderReward):
    """PickScore: human preference for a prompt (arXiv:2305.01569).

    score = exp(logit_scale) * cos(f(image), g(prompt)) with CLIP-H fine-tuned on Pick-a-Pic, as in the authors' code.
    Typical images score 20 to 23. Only differences are meaningful: exp(a - b) are the odds that people prefer an image
    with score a to one with score b.

    Args:
        config: the options; defaults if None.

    Raises:
        WeightsError: the weights are not on this machine, or belong to another model.
    """

    Config: ClassVar[type[RewardConfig]] = PickScoreConfig
    config: PickScoreConfig

    def __init__(self, config: PickScoreConfig | None = None) -> None:
        super().__init__(config)
        path = find_weights(self.config.weights, reward="pickscore", default=PICKSCORE_WEIGHTS)
        architecture = Architecture.from_name("ViT-H-14", pretrained="laion2b_s32b_b79k")
        self.encoder = load_clip(path, architecture, precision=self.config.precision)
        # The authors use transformers' processor; its center crop is one pixel off open_clip's for some sizes.
        self.encoder.preprocess = replace(self.encoder.preprocess, crop="floor")

    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) scaled cosine similarities; float32, or float64 if the images are."""
        return cosine(self.encoder, batch) * self.encoder.logit_scale.to(batch.images.device)


class SiglipScore(EncoderReward):
    """Image-prompt logit of a SigLIP model (arXiv:2303.15343).

    score = exp(logit_scale) * cos(f(image), g(prompt)) + logit_bias; 0 means even odds of a match. The logit has the
    same slope everywhere, so good samples keep their gradient; bound it with a `ceiling`. With
    `output: log_probability` the score is log(sigmoid(logit)), which saturates at 0.

    Args:
        config: the options; defaults if None.

    Raises:
        ConfigError: the model is unknown, not supported, or has no default weights.
        WeightsError: the weights are not on this machine, belong to another model, or have no logit_bias.
    """

    Config: ClassVar[type[RewardConfig]] = SiglipScoreConfig
    config: SiglipScoreConfig

    def __init__(self, config: SiglipScoreConfig | None = None) -> None:
        super().__init__(config)
        self.encoder = load_encoder(self.config, "siglip_score", defaults=PRETRAINED_SIGLIP)
        if self.encoder.logit_bias is None:
            raise WeightsError(
                f"siglip_score: the weights ({self.config.weights}) have no logit_bias, so their model was not trained "
                "with the sigmoid loss. Choose a SigLIP model, or use clip_score."
            )

    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) logits or log-probabilities; float32, or float64 if the images are."""
        similarity = cosine(self.encoder, batch)
        bias = self.encoder.logit_bias
        logits = similarity * self.encoder.logit_scale.to(similarity)
        logits = logits + (torch.zeros_like(self.encoder.logit_scale) if bias is None else bias).to(similarity)
        return F.logsigmoid(logits) if self.config.output == "log_probability" else logits
