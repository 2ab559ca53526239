"""Rewards that compare a picture with its prompt: clip_score, pickscore, siglip_score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from alignprop_clip.architecture import Architecture
from alignprop_clip.catalogue import KNOWN, PICKSCORE_WEIGHTS, WITH_BIAS, Known, trained_with_quick_gelu
from alignprop_clip.config import ClipScoreConfig, ModelConfig, PickScoreConfig, SiglipScoreConfig
from alignprop_clip.encoder import ClipEncoder, load_clip
from alignprop_core.errors import ConfigError, WeightsError
from alignprop_core.reward import ImageBatch, Reward
from alignprop_core.specs import RewardConfig
from alignprop_core.weights import find_weights


def load_model(
    config: ModelConfig, reward: str, *, images_only: bool = False, defaults: Mapping[str, Known] = KNOWN
) -> ClipEncoder:
    """Load the model a reward's options name.

    Args:
        config: the options.
        reward: the reward's name: named sets of weights are looked up for it.
        images_only: leave the text tower out.
        defaults: the models that "default" weights are known for, of those the reward can use.

    Raises:
        ConfigError: open_clip has no such model, it is of a kind that is not supported, or no default weights are
            known for it.
        WeightsError: the weights are not here, or are those of another model.
    """
    model = config.model.replace("/", "-")
    known = defaults.get(model)
    quick_gelu = config.quick_gelu
    if quick_gelu is None and config.weights == "default" and known is not None:
        quick_gelu = known.quick_gelu
    if quick_gelu is None and trained_with_quick_gelu(config.weights):
        quick_gelu = True
    # Before the weights: a misspelt model must not be answered with "there are no weights".
    architecture = Architecture.named(model, quick_gelu=quick_gelu)
    weights = config.weights
    if weights == "default" and known is None:
        raise ConfigError(
            f'Reward "{reward}": it has no default weights for the model {config.model}; name some with weights: '
            f"PATH or weights: hub:owner/name/file. There are defaults for {', '.join(defaults)}."
        )
    default = known.weights if known is not None else None
    if weights == "default" and default is not None and model != type(config).model_fields["model"].default:
        # Not the file `alignprop rewards fetch NAME` brings, so the message names this one.
        weights = f"hub:{default.repository}/{default.file}"
    path = find_weights(weights, reward=reward, default=default)
    return load_clip(
        path, architecture, images_only=images_only, precision=config.precision, quick_gelu=config.quick_gelu
    )


def cosine(encoder: ClipEncoder, batch: ImageBatch) -> Tensor:
    """Return (B,) cosines of pictures and their prompts; float32, float64 if the images are."""
    images = encoder.images(batch.images)
    return (images * encoder.prompts(batch.prompts).to(images)).sum(-1)


class EncoderReward(Reward):
    """A reward that looks at pictures through a CLIP model; its subclasses build `encoder`, and score."""

    encoder: ClipEncoder

    def image_features(self, images: Tensor) -> Tensor:
        """Return the image embeddings that scores are made of, for `evaluation.diversity_encoder` and others.

        Args:
            images: (B, 3, H, W) in [0, 1], any size, any floating-point type.

        Returns:
            (B, D) of length 1, float32 (float64 if the images are), with a gradient to the pixels.
        """
        return self.encoder.images(images)


class ClipScore(EncoderReward):
    """Cosine of image and text embedding under a CLIP model.

    score = cos(f(image), g(prompt)), in [-1, 1]; matching photographs lie near 0.25 to 0.35 under ViT-L-14. CLIPScore
    (arXiv:2104.08718) is 2.5 times this, cut off at 0; some libraries multiply by 100. It takes any model of open_clip
    with open_clip's own text tower.
    """

    Config: ClassVar[type[RewardConfig]] = ClipScoreConfig
    config: ClipScoreConfig

    def __init__(self, config: ClipScoreConfig | None = None) -> None:
        super().__init__(config)
        self.encoder = load_model(self.config, "clip_score")

    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) cosines; float32, or float64 if the images are."""
        return cosine(self.encoder, batch)


class PickScore(EncoderReward):
    """PickScore: which picture people would pick for a prompt (arXiv:2305.01569).

    score = exp(logit_scale) * cos(f(image), g(prompt)) with CLIP-H fine-tuned on Pick-a-Pic, as the authors score;
    about 20 to 23 for usual pictures. Differences count, not values: exp(a - b) are one picture's odds over another.
    """

    Config: ClassVar[type[RewardConfig]] = PickScoreConfig
    config: PickScoreConfig

    def __init__(self, config: PickScoreConfig | None = None) -> None:
        super().__init__(config)
        path = find_weights(self.config.weights, reward="pickscore", default=PICKSCORE_WEIGHTS)
        self.encoder = load_clip(path, Architecture.named("ViT-H-14"), precision=self.config.precision)
        # The authors' processor is transformers', which cuts out the middle a pixel off open_clip's for some sizes.
        self.encoder.preprocess = replace(self.encoder.preprocess, crop="floor")

    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) scaled cosines; float32, or float64 if the images are."""
        return cosine(self.encoder, batch) * self.encoder.logit_scale.to(batch.images.device)


class SiglipScore(EncoderReward):
    """A SigLIP model's logit for picture and prompt (arXiv:2303.15343).

    score = exp(logit_scale) * cos(f(image), g(prompt)) + logit_bias; 0 is even odds that they belong together. The
    logit has the same slope everywhere, so one good sample does not stop learning while others are bad; limit it with a
    `ceiling`. With `output: log_probability` the score is log(sigmoid(logit)): it levels off at 0 by itself.
    """

    Config: ClassVar[type[RewardConfig]] = SiglipScoreConfig
    config: SiglipScoreConfig

    def __init__(self, config: SiglipScoreConfig | None = None) -> None:
        super().__init__(config)
        self.encoder = load_model(self.config, "siglip_score", defaults=WITH_BIAS)
        if self.encoder.logit_bias is None:
            raise WeightsError(
                f"siglip_score: the weights ({self.config.weights}) have no logit_bias, so they are of a CLIP model, "
                "not of one trained with the sigmoid loss. Choose a SigLIP model, or take clip_score."
            )

    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) logits, or their log-probabilities; float32, or float64 if the images are."""
        similarity = cosine(self.encoder, batch)
        bias = self.encoder.logit_bias
        logits = similarity * self.encoder.logit_scale.to(similarity)
        logits = logits + (torch.zeros_like(self.encoder.logit_scale) if bias is None else bias).to(similarity)
        return F.logsigmoid(logits) if self.config.output == "log_probability" else logits
