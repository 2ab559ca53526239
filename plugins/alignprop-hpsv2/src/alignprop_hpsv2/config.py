"""Options of the hpsv2 reward. Importing this module imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from alignprop_clip.config import ClipConfig
from alignprop_hpsv2.published import DEFAULT_VERSION, Version


def _version_text(value: object) -> object:
    """Convert a version to text: YAML reads an unquoted 2.1 as a number, and the original package writes v2.1."""
    return str(value) if isinstance(value, float) else value.removeprefix("v") if isinstance(value, str) else value


def _american(value: object) -> object:
    """Accept the spelling of earlier versions."""
    return "center_crop" if value == "centre_crop" else value


class Hpsv2Config(ClipConfig):
    """Options of `hpsv2`."""

    version: Annotated[Version, BeforeValidator(_version_text)] = Field(
        default=DEFAULT_VERSION,
        description="Version of the weights: 2.1 (more and cleaner training data) or 2.0 (as in the HPSv2 paper).",
    )
    weights: str = Field(
        default="default",
        description='Weights: "default" (published for the version), "starter", a local file, or hub:owner/name/file.',
    )
    preprocessing: Annotated[Literal["official", "center_crop"], BeforeValidator(_american)] = Field(
        default="official",
        description='"official": longest side to 224, black padding; "center_crop": shortest side to 224, center crop.',
    )
