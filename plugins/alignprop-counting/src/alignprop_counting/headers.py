"""What a weights file or the JSON beside it says of a detector, checked before anything is built from it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alignprop_core.errors import WeightsError

ImageSize = Annotated[int, Field(ge=32, le=4096)]
"""Side in pixels; the range of the option `image_size`."""


class FileHeader(BaseModel):
    """Base of what a file says of itself: types are strict, keys that nobody reads are let be."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    image_size: ImageSize | None = None


class Architecture(FileHeader):
    """A network of transformers and its configuration."""

    architecture: str
    config: dict[str, Any]


class TransformersHeader(FileHeader):
    """A header of RT-DETR or DETR."""

    transformers: Architecture | None = None


class TransformersFolder(FileHeader):
    """A `config.json` of transformers."""

    image_size: Any = None  # means another thing there
    architectures: list[str] = Field(min_length=1)


Kind = TypeVar("Kind", bound=FileHeader)


def checked(kind: type[Kind], values: Mapping[str, Any], where: str) -> Kind:
    """Return the values as `kind`; `WeightsError` that names the file (`where`) and the key if they are not."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        given = "" if first["type"] == "missing" else f" (it is {_short(first['input'])})"
        raise WeightsError(
            f"{where}: {key}: {said[0].lower()}{said[1:]}{given}. Make the file anew, or take another."
        ) from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
