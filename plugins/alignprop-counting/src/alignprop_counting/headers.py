"""Schemas of weight-file headers and config.json files, validated before a model is built. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alignprop_core.errors import WeightsError

ImageSize = Annotated[int, Field(ge=32, le=4096)]
"""Side in pixels; the range of the option `image_size`."""


class FileHeader(BaseModel):
    """Base of the headers: types are strict, unknown keys are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    image_size: ImageSize | None = None


class Architecture(FileHeader):
    """A model class of transformers and its configuration."""

    architecture: str
    config: dict[str, Any]


class TransformersHeader(FileHeader):
    """Header of an RT-DETR or DETR file."""

    transformers: Architecture | None = None


class TransformersFolder(FileHeader):
    """A `config.json` of transformers."""

    image_size: Any = None  # has another meaning there
    architectures: list[str] = Field(min_length=1)


Kind = TypeVar("Kind", bound=FileHeader)


def checked(kind: type[Kind], values: Mapping[str, Any], where: str) -> Kind:
    """Validate the values as `kind`; the `WeightsError` names the file (`where`) and the key."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        given = "" if first["type"] == "missing" else f" (it is {_short(first['input'])})"
        raise WeightsError(
            f"{where}: {key}: {message[0].lower()}{message[1:]}{given}. Create the file again, or use another one."
        ) from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
