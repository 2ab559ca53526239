"""Image processors of transformers as differentiable preprocessing: the library's own code, applied to tensors.

So every key of a preprocessor_config.json has the effect that it has in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms
from transformers import AutoImageProcessor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.processing_utils import ImagesKwargs

from alignprop_classifier.file_options import options_from_file
from alignprop_classifier.preprocessing import Preprocessing, ResizeCrop
from alignprop_core.errors import WeightsError, complaint, did_you_mean
from alignprop_core.weights import quiet_transformers

_INFORMATION = (
    "image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "backend", "use_fast",
    "transformers_version", "reduce_labels",
)  # fmt: skip
"""Keys that do not change the images; `reduce_labels` is an old name of `do_reduce_labels`, which is for label maps."""

_FILTERS = {
    int(filter): filter for filter in (Image.Resampling.LANCZOS, Image.Resampling.BOX, Image.Resampling.HAMMING)
}
"""Filters that torchvision does not have for tensors, or not on every device."""


class Processor(Preprocessing):
    """A transformers image processor.

    Args:
        processor: an image processor with the torchvision backend.
        side: side of the images with which the size of the network's input is determined.
        geometry: resizes and crops instead of the processor, which then only normalizes.

    Raises:
        ValueError: the processor does not return one (3, H, W) image with a gradient.
    """

    def __init__(self, processor: Any, side: int, geometry: ResizeCrop | None = None) -> None:
        self._processor = processor
        self._side = side
        self._geometry = geometry
        blank = torch.zeros(1, 3, side, side, requires_grad=True)
        output = self(blank)
        if output.ndim != 4 or output.shape[1] != 3 or not output.requires_grad:
            raise ValueError(f"{type(processor).__name__} does not return images with a gradient to the pixels")
        self._size = (output.shape[2], output.shape[3])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the network's input; for images that are not resized, those of a square one."""
        return self._size

    def __call__(self, images: Tensor) -> Tensor:
        """Return the processor's `pixel_values`."""
        if self._geometry is not None:
            images = self._geometry.cropped(images)
        # Processors expect pixels of 0 to 255.
        batch = self._processor(
            list(images * 255), return_tensors="pt", input_data_format="channels_first", device=images.device
        )
        pixels: Tensor = batch["pixel_values"]
        return pixels

    def with_options(self, options: Mapping[str, Any]) -> Processor:
        """Return a copy with the given options; a new image size scales all sizes of the processor."""
        processor, geometry = copy(self._processor), self._geometry
        if "mean" in options or "std" in options:
            processor.do_normalize = True
            processor.image_mean = options.get("mean", processor.image_mean)
            processor.image_std = options.get("std", processor.image_std)
        if "interpolation" in options:
            processor.resample = Image.Resampling[options["interpolation"].upper()]
        if "crop" in options or "fit" in options or (geometry is not None and options):
            side = self.size[0]
            geometry = geometry or ResizeCrop(side, side, interpolation=_filter_name(processor))
            processor.do_resize = processor.do_center_crop = processor.do_pad = False
            geometry = geometry.with_options({k: v for k, v in options.items() if k not in ("mean", "std")})
        elif "image_size" in options:
            factor = options["image_size"] / self.size[0]
            for key in ("size", "crop_size", "pad_size"):
                if value := getattr(processor, key, None):
                    sides = {name: round(length * factor) for name, length in dict(value).items() if length}
                    setattr(processor, key, type(value)(**sides))
        return Processor(processor, self._side, geometry)

    def describe(self) -> dict[str, Any]:
        """Return the steps of the processor."""
        own = self._processor
        steps: dict[str, Any] = {"image processor": type(own).__name__}
        if self._geometry is not None:
            steps |= {"resize": self._geometry.describe_resize(), "crop": self._geometry.describe_crop()}
        if own.do_resize:
            filter = _filter_name(own)
            steps["resize"] = f"{_sides(own.size)}, {filter}{', antialiased' if filter != 'nearest' else ''}"
        if own.do_center_crop:
            steps["crop"] = f"center, {_sides(own.crop_size)}"
        if own.do_rescale:
            steps["rescale"] = f"pixels of 0 to 255 times {own.rescale_factor:.6g}"
        if own.do_normalize:
            steps |= {"mean": own.image_mean, "std": own.image_std}
        if own.do_pad:
            steps["pad"] = _sides(own.pad_size) if own.pad_size else "to the largest image of a batch"
        more = set(own.valid_kwargs.__annotations__) - set(ImagesKwargs.__annotations__)
        return steps | {key: value for key in sorted(more) if (value := getattr(own, key, None)) is not None}


def read_processor(path: Path, values: Mapping[str, Any], side: int) -> Processor:
    """Build the image processor of a preprocessor_config.json.

    Args:
        path: the file, with the model's config.json in the same folder.
        values: its contents.
        side: side of the images with which the size of the network's input is determined.

    Raises:
        WeightsError: a key is unknown, a value is invalid, or the processor's images have no gradient.
    """
    _check_values(path, values)
    try:
        with quiet_transformers():
            auto: Any = AutoImageProcessor.from_pretrained(
                str(path.parent), local_files_only=True, trust_remote_code=False, backend="torchvision"
            )
            known = set(auto.valid_kwargs.__annotations__)
            unknown = [key for key, value in values.items() if value is not None and key not in known]
            unknown = [key for key in unknown if key not in _INFORMATION and not key.startswith("_")]
            if not unknown:
                kind: Any = type(type(auto).__name__, (type(auto), _Differentiable), {})
                return Processor(kind.from_dict({key: values[key] for key in values if key in known}), side)
    except Exception as error:  # transformers and torchvision raise many types for an invalid value
        raise WeightsError(
            f"{path}: transformers cannot prepare images with this file: {complaint(error)}. Fix it, fetch it again, "
            "or choose another model."
        ) from error
    raise WeightsError(
        f"{path}: {unknown[0]}: {type(auto).__name__} has no such key.{did_you_mean(unknown[0], known)} Correct it, or "
        "remove it."
    )


def _check_values(path: Path, values: Mapping[str, Any]) -> None:
    """Raise `WeightsError` for sizes, means and standard deviations that transformers would accept and misuse."""
    for key in ("size", "crop_size", "pad_size"):
        sides = values.get(key)
        for side in sides.values() if isinstance(sides, dict) else sides if isinstance(sides, list) else [sides]:
            if side is not None and not (isinstance(side, int) and side > 0):
                raise WeightsError(
                    f"{path}: {key}: sizes must be positive integers (got {sides!r}). Fetch the file again."
                )
    for key, value in values.items():
        if key.startswith("do_") and not isinstance(value, (bool, type(None))):
            raise WeightsError(f"{path}: {key}: must be true or false (got {value!r}). Fetch the file again.")
    if values.get("resample") not in (None, *range(6)):
        raise WeightsError(
            f"{path}: resample: must be one of Pillow's filters, 0 to 5 (got {values['resample']!r}). Fetch the file "
            "again."
        )
    keys = {"mean": "image_mean", "std": "image_std", "crop": "crop_pct"}
    given = {option: values.get(key) for option, key in keys.items() if not isinstance(values.get(key), float)}
    crop = values.get("crop_pct")
    options_from_file(given | ({} if crop is None else {"crop": crop}), str(path), keys)


def _filter_name(processor: Any) -> str:
    """Return the name of a processor's resize filter, such as "bilinear", which is the default."""
    resample = processor.resample
    return (Image.Resampling.BILINEAR if resample is None else Image.Resampling(int(resample))).name.lower()


def _sides(size: Any) -> str:
    """Return a size of an image processor in words: `224 x 224`, or `shortest_edge 256`."""
    sides = {name: length for name, length in dict(size).items() if length}
    if set(sides) == {"height", "width"}:
        return f"{sides['height']} x {sides['width']}"
    return ", ".join(f"{name} {length}" for name, length in sides.items())


class _Differentiable(TorchvisionBackend):  # type: ignore[misc]  # transformers has no types
    """Base of every processor here, behind its own class: all of Pillow's filters, and float64."""

    def resize(self, image: Tensor, size: Any, resample: Any = None, **more: Any) -> Tensor:
        """Resize with any of Pillow's filters, as matrix products where torchvision has none for tensors."""
        filter = _FILTERS.get(resample) if isinstance(resample, int) else None
        if filter is None:
            resized: Tensor = super().resize(image, size, resample=resample, **more)
            return resized
        shape = super().resize(image.to("meta"), size, **more).shape
        rows, columns = (
            torch.from_numpy(_weights(old, new, filter)).to(image)
            for old, new in zip(image.shape[-2:], shape[-2:], strict=True)
        )
        return rows.T @ image @ columns  # (H', H) @ (..., H, W) @ (W, W')

    def rescale_and_normalize(
        self,
        images: Tensor,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
    ) -> Tensor:
        """Rescale and normalize in the dtype of the images; transformers would round float64 to float32."""
        if do_rescale:
            images = images * rescale_factor
        if not do_normalize:
            return images
        channels = images.shape[1]
        mean, std = (list(v) if isinstance(v, (list, tuple)) else [v] * channels for v in (image_mean, image_std))
        normalized: Tensor = transforms.normalize(images, mean, std)
        return normalized


@lru_cache(maxsize=16)
def _weights(old: int, new: int, filter: Image.Resampling) -> Any:
    """Return (old, new) weights of Pillow's resize along one side: resizing is linear, so those of the identity."""
    identity = Image.fromarray(np.eye(old, dtype=np.float32))
    return np.array(identity.resize((new, old), filter))
