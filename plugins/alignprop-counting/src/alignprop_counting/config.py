"""Options of the counting rewards. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from alignprop_core.specs import RewardConfig
from alignprop_counting.headers import ImageSize

Number = Annotated[int, Field(ge=0, le=1000)]


class DetectorConfig(RewardConfig):
    """Which detector is used, for which classes, and when an object counts; shared by all rewards and measures."""

    detector: str = Field(
        default="rtdetr", description="Detector of an installed plugin: rtdetr, detr, yolo, yolo11n, ..."
    )
    weights: str = Field(
        default="default", description="The detector's default file, a local path, hub:owner/name/file, or starter."
    )
    image_size: ImageSize | None = Field(
        default=None, description="Side in pixels that images are resized to; null is the detector's default."
    )
    source: Literal["prompt", "metadata", "config"] = Field(
        default="prompt",
        description="Where the class and the number are read from, unless objects and number set them.",
    )
    objects: str | tuple[str, ...] | None = Field(
        default=None, description="Class name or names of the detector; null reads them from the source."
    )
    object_key: str = Field(default="object", description="Metadata key of the class name or names.")
    threshold: float = Field(default=0.5, gt=0, lt=1, description="Class probability above which an object counts.")
    overlap: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="Intersection over union above which two boxes are one object (one-to-many detectors only).",
    )

    @property
    def names(self) -> tuple[str, ...] | None:
        """The fixed class names, or None."""
        return (self.objects,) if isinstance(self.objects, str) else self.objects

    @model_validator(mode="after")
    def _check_objects(self) -> Self:
        if self.names == ():
            raise ValueError("objects is an empty list; name a class, or omit the option to read it from the source")
        if self.source == "config" and self.names is None:
            raise ValueError("source: config needs objects (the class name or names)")
        return self


class NumberConfig(DetectorConfig):
    """How many objects are requested."""

    number: Number | tuple[Number, ...] | None = Field(
        default=None,
        description="Requested number: one for all objects or one for each; null reads it from the source.",
    )
    number_key: str = Field(default="number", description="Metadata key of the number or numbers.")

    @property
    def numbers(self) -> tuple[int, ...] | None:
        """The fixed numbers, or None."""
        return (self.number,) if isinstance(self.number, int) else self.number

    @model_validator(mode="after")
    def _check_numbers(self) -> Self:
        if self.source == "config" and self.numbers is None:
            raise ValueError("source: config needs number")
        if self.numbers is not None and len(self.numbers) != 1:
            if self.names is None:
                raise ValueError("number is a list, so objects must be a list of the same length")
            if len(self.numbers) != len(self.names):
                raise ValueError(f"{len(self.names)} objects but {len(self.numbers)} numbers")
        return self


class ObjectCountConfig(NumberConfig):
    """Options of `object_count`."""

    sharpness: float = Field(
        default=2.0, gt=0, le=100, description="How sharply the soft count steps at the threshold; see the README."
    )
    delta: float = Field(
        default=0.5,
        gt=0,
        description="Error in objects up to which the Huber penalty is quadratic; beyond it is linear.",
    )


class HardCountConfig(NumberConfig):
    """Options of `hard_count`."""

    measure: Literal["exact", "error", "count"] = Field(
        default="exact",
        description="exact: 1 if all counts are right, else 0; error: minus the mean absolute error; count: objects.",
    )


class PresenceConfig(DetectorConfig):
    """Options of `object_presence` and `hard_presence`."""


class AbsenceConfig(DetectorConfig):
    """Options of `object_absence` and `hard_absence`."""
