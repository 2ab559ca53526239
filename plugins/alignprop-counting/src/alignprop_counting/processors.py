"""Image processors of transformers as differentiable preprocessing: the library's own code, applied to tensors.

So every key of a preprocessor_config.json has the effect that it has in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms
from transformers import AutoImageProcessor
from transformers.image_processing_backends import TorchvisionBackend

from alignprop_core.errors import WeightsError, complaint, did_you_mean
from alignprop_core.weights import quiet_transformers, read_json

_INFORMATION = (
    "image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "backend", "use_fast",
    "transformers_version", "max_size", "pad_and_return_pixel_mask",
)  # fmt: skip
"""Keys that do not change the images, and old names that transformers itself translates."""

_FILTERS = (None, Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


class _Differentiable(TorchvisionBackend):  # type: ignore[misc]  # transformers has no types
    """Base of every processor here, behind its own class: float64 images stay float64."""

    def rescale_and_normalize(
        self,
        images: Tensor,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
    ) -> Tensor:
        if do_rescale:
            images = images * rescale_factor
        if not do_normalize:
            return images
        mean, std = (list(v) if isinstance(v, (list, tuple)) else [v] * 3 for v in (image_mean, image_std))
        normalized: Tensor = transforms.normalize(images, mean, std)
        return normalized


def build_processor(kind: type[Any], **values: Any) -> Any:
    """Build an image processor whose output has a gradient to the pixels.

    Args:
        kind: its class in transformers, with the torchvision backend.
        values: its options; the class defaults otherwise.
    """
    differentiable: Any = type(kind.__name__, (kind, _Differentiable), {})
    return differentiable.from_dict(values)


def read_processor(path: Path) -> Any:
    """Build the image processor of a preprocessor_config.json.

    Args:
        path: the file, with the model's config.json in the same folder.

    Raises:
        WeightsError: a key is unknown or a value is invalid.
    """
    values = read_json(path)
    for key, value in values.items():
        if key.startswith("do_") and not isinstance(value, (bool, type(None))):
            raise WeightsError(f"{path}: {key}: must be true or false (got {value!r}). Fetch the file again.")
    if values.get("resample") not in _FILTERS:
        raise WeightsError(
            f"{path}: resample: detectors resize with filter 0 (nearest), 2 (bilinear) or 3 (bicubic), got "
            f"{values['resample']!r}. Choose another model, or change the value, which changes the scores slightly."
        )
    try:
        with quiet_transformers():
            auto: Any = AutoImageProcessor.from_pretrained(
                str(path.parent), local_files_only=True, trust_remote_code=False, backend="torchvision"
            )
            unknown = _unknown(values, auto)
            if not unknown:
                processor = build_processor(type(auto), **values)
                prepare(processor, torch.zeros(1, 3, 64, 64))
                return processor
    except Exception as error:  # transformers and torchvision raise many types for an invalid value
        raise WeightsError(
            f"{path}: transformers cannot prepare images with this file: {complaint(error)}. Fix it, fetch it again, "
            "or choose another model."
        ) from error
    hint = did_you_mean(unknown[0], auto.valid_kwargs.__annotations__)
    raise WeightsError(f"{path}: {unknown[0]}: {type(auto).__name__} has no such key.{hint} Correct it, or remove it.")


def _unknown(values: Mapping[str, Any], processor: Any) -> list[str]:
    known = (*processor.valid_kwargs.__annotations__, *_INFORMATION)
    return [key for key, value in values.items() if value is not None and key not in known and key[0] != "_"]


def prepare(processor: Any, images: Tensor) -> dict[str, Tensor]:
    """Return the `pixel_values` of images (B, 3, H, W) in [0, 1], and the `pixel_mask` if they are padded."""
    # Processors expect pixels of 0 to 255.
    batch = processor(
        images=list(images * 255), return_tensors="pt", input_data_format="channels_first", device=images.device
    )
    return {key: batch[key] for key in ("pixel_values", "pixel_mask") if key in batch}


def describe_processor(processor: Any) -> dict[str, Any]:
    """Return the steps of an image processor: labels and values for `alignprop rewards show`."""
    steps: dict[str, Any] = {"image processor": type(processor).__name__}
    if processor.do_resize:
        resample = processor.resample
        filter = Image.Resampling.BILINEAR if resample is None else Image.Resampling(int(resample))
        sides = ", ".join(f"{name} {length}" for name, length in dict(processor.size).items() if length)
        steps["resize"] = f"{sides}, {filter.name.lower()}, antialiased"
    if processor.do_rescale:
        steps["rescale"] = f"pixels of 0 to 255 times {processor.rescale_factor:.6g}"
    if processor.do_normalize:
        steps |= {"mean": processor.image_mean, "std": processor.image_std}
    if processor.do_pad and processor.pad_size:
        steps["pad"] = f"{processor.pad_size['height']} x {processor.pad_size['width']}"
    return steps
