"""Preprocessing of a classifier's images: resize, crop and normalize, differentiably with respect to the pixels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms


class Preprocessing(ABC):
    """Maps (B, 3, H, W) images in [0, 1] of any size to the input of a network."""

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """Height and width of the network's input."""

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Return the network's input; float64 if the images are."""

    @abstractmethod
    def with_options(self, options: Mapping[str, Any]) -> Preprocessing:
        """Return a copy with the options image_size, fit, crop, interpolation, mean and std that are given."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return labels and values for `alignprop rewards show`."""


@dataclass(frozen=True)
class ResizeCrop(Preprocessing):
    """Resize with antialiasing, center-crop to a square, normalize.

    Bicubic overshoot beyond [0, 1] is not clipped: clipping would remove the gradient of saturated pixels.

    Attributes:
        image_size: side of the crop, in pixels.
        resized: the shorter side of the image is resized to this; with `fit: squash`, both sides.
        mean: mean of each channel, for images in [0, 1].
        std: standard deviation of each channel, for images in [0, 1].
        interpolation: "bilinear" or "bicubic".
        fit: "crop" keeps the aspect ratio of an image when it is resized, "squash" does not.
    """

    image_size: int = 224
    resized: int = 256
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    fit: str = "crop"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the crop."""
        return self.image_size, self.image_size

    def __call__(self, images: Tensor) -> Tensor:
        """Return the resized, cropped and normalized images."""
        normalized: Tensor = transforms.normalize(self.cropped(images), list(self.mean), list(self.std))
        return normalized

    def cropped(self, images: Tensor) -> Tensor:
        """Return the resized and cropped images, (B, 3, S, S), not normalized."""
        size = [self.resized, self.resized] if self.fit == "squash" else [self.resized]
        resized = transforms.resize(images, size, interpolation=InterpolationMode(self.interpolation), antialias=True)
        cropped: Tensor = transforms.center_crop(resized, [self.image_size, self.image_size])
        return cropped

    def with_options(self, options: Mapping[str, Any]) -> ResizeCrop:
        """Return a copy with the given options; a new image size keeps the fraction that is cropped."""
        given = dict(options)
        crop = given.pop("crop", None) or self.image_size / self.resized
        changed = replace(self, **given)
        if "image_size" in options or "crop" in options:
            changed = replace(changed, resized=max(changed.image_size, int(changed.image_size / crop)))
        return changed

    def describe(self) -> dict[str, Any]:
        """Return labels and values for `alignprop rewards show`."""
        return {"resize": self.describe_resize(), "crop": self.describe_crop(), "mean": self.mean, "std": self.std}

    def describe_resize(self) -> str:
        """Return the resize step in words."""
        what = f"{self.resized} x {self.resized}" if self.fit == "squash" else f"shorter side to {self.resized}"
        return f"{what}, {self.interpolation}, antialiased"

    def describe_crop(self) -> str:
        """Return the crop step in words."""
        return f"center, {self.image_size} x {self.image_size}"


class TimmTransform(Preprocessing):
    """timm's own evaluation transform, applied to tensors.

    Args:
        settings: the data config, as `timm.data.resolve_data_config` returns it.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from timm.data import create_transform

        self.settings = dict(settings)
        # Without normalization timm's transform keeps the scale of its input.
        self._resize_and_crop: Any = create_transform(**self.settings, is_training=False, normalize=False)
        # With crop_mode border, tensors can be padded with one value only. So `__call__` subtracts the color of the
        # border, and adds it again: resizing does not change a constant.
        self._border = [0.0, 0.0, 0.0]
        if self.settings["crop_mode"] == "border":
            self._border = [round(255 * value) / 255 for value in self.settings["mean"]]
            self._resize_and_crop.transforms[1].fill = 0

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the network's input."""
        _, height, width = self.settings["input_size"]
        return height, width

    def __call__(self, images: Tensor) -> Tensor:
        """Return the resized, cropped and normalized images."""
        border = images.new_tensor(self._border).view(3, 1, 1)
        cropped = self._resize_and_crop(images - border) + border
        normalized: Tensor = transforms.normalize(cropped, list(self.settings["mean"]), list(self.settings["std"]))
        return normalized

    def with_options(self, options: Mapping[str, Any]) -> TimmTransform:
        """Return a copy whose data config has the given options."""
        given = dict(options)
        changes: dict[str, Any] = {key: given[key] for key in ("interpolation", "mean", "std") if key in given}
        if "image_size" in given:
            changes["input_size"] = (3, given["image_size"], given["image_size"])
        if "crop" in given:
            changes["crop_pct"] = given["crop"]
        if "fit" in given:
            changes["crop_mode"] = "squash" if given["fit"] == "squash" else "center"
        return TimmTransform(self.settings | changes)

    def describe(self) -> dict[str, Any]:
        """Return timm's data config."""
        keys = ("input_size", "crop_mode", "crop_pct", "interpolation", "mean", "std")
        return {key: self.settings[key] for key in keys}
