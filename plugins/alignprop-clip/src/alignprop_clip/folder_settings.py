"""Settings in the JSON files beside a weights file, as open_clip and transformers save them with a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alignprop_clip.header_schema import Channels, Deviations
from alignprop_clip.published import Settings, from_open_clip
from alignprop_core.errors import WeightsError

OPEN_CLIP = "open_clip_config.json"
TRANSFORMERS = "config.json"
PROCESSOR = "preprocessor_config.json"

_BILINEAR = 2  # Pillow's numbers, which transformers stores; 3 is bicubic


Parsed = TypeVar("Parsed", bound=BaseModel)


class _Json(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class _Preprocessing(_Json):
    """open_clip's `preprocess_cfg`."""

    mean: Channels | None = None
    std: Deviations | None = None
    resize_mode: Literal["shortest", "longest", "squash"] | None = None
    interpolation: Literal["bicubic", "bilinear", "random"] | None = None
    mode: Literal["RGB"] = "RGB"
    fill_color: Literal[0] = 0


class _Model(_Json):
    quick_gelu: bool = False


class _OpenClip(_Json):
    model_cfg: _Model
    preprocess_cfg: _Preprocessing = _Preprocessing()


class _Tower(_Json):
    hidden_act: Literal["gelu", "quick_gelu"] = "quick_gelu"


class _Clip(_Json):
    """transformers' CLIPConfig."""

    vision_config: _Tower = _Tower()
    text_config: _Tower = _Tower()


class _Processor(_Json):
    """transformers' CLIPImageProcessor; a value that changes the images otherwise is refused."""

    image_mean: Channels | None = None
    image_std: Deviations | None = None
    resample: Literal[2, 3] = 3
    do_resize: Literal[True] = True
    do_center_crop: Literal[True] = True
    do_rescale: Literal[True] = True
    do_normalize: Literal[True] = True
    rescale_factor: float = Field(default=1 / 255, ge=1 / 255 - 1e-6, le=1 / 255 + 1e-6)


def settings_beside(path: Path) -> Settings | None:
    """Return the settings in the folder of a weights file: open_clip_config.json, else transformers' CLIP files.

    Raises:
        WeightsError: such a file cannot be read, or has a value that is not supported; the message names the key.
    """
    file = path.parent / OPEN_CLIP
    if (stored := _read(file)) is not None and "model_cfg" in stored:
        parsed = _validated(_OpenClip, stored, file)
        return from_open_clip(parsed.preprocess_cfg.model_dump(), parsed.model_cfg.quick_gelu, str(file))
    file = path.parent / TRANSFORMERS
    if (stored := _read(file)) is None or stored.get("model_type") != "clip":
        return None
    towers = _validated(_Clip, stored, file)
    activations = {towers.vision_config.hidden_act, towers.text_config.hidden_act}
    if len(activations) > 1:
        raise WeightsError(f"{file}: hidden_act differs between vision_config and text_config, which is not supported.")
    found = from_open_clip({}, activations == {"quick_gelu"}, str(file))
    file = path.parent / PROCESSOR
    if (stored := _read(file)) is None:
        return found
    processor = _validated(_Processor, stored, file)
    return replace(
        found,
        mean=tuple(processor.image_mean or found.mean),
        std=tuple(processor.image_std or found.std),
        interpolation="bilinear" if processor.resample == _BILINEAR else "bicubic",
    )


def _read(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file} cannot be read as JSON: {error}. Fetch the file again, or delete it.") from error
    return stored if isinstance(stored, dict) else None


def _validated(kind: type[Parsed], stored: Mapping[str, Any], file: Path) -> Parsed:
    try:
        return kind.model_validate(dict(stored))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise WeightsError(
            f"{file}: {key} is {first['input']!r}, which this reward does not support: {first['msg']}. If the weights "
            "are published by open_clip, set the option pretrained to their tag."
        ) from error
