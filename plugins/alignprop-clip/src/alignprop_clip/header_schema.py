"""Schema of the `config` header in a CLIP weights file, and its validation. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from alignprop_core.errors import WeightsError

Count = Annotated[int, Field(gt=0, le=1 << 24)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Channels = Annotated[list[Number], Field(min_length=3, max_length=3)]
Deviations = Annotated[list[Annotated[Number, Field(gt=0)]], Field(min_length=3, max_length=3)]


class _Section(BaseModel):
    """Strict JSON types ("77" is not a number). Keys not declared below are passed to open_clip unchecked."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class Vision(_Section):
    """open_clip's `vision_cfg`."""

    image_size: Count = 224
    patch_size: Count | list[Count] = 16
    width: Count = 768
    head_width: Count = 64
    layers: Count | list[Count] = 12
    # No source prefix: timm would look up a name such as "hf-hub:..." on the network.
    timm_model_name: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None


class TokenizerOptions(_Section):
    """open_clip's `tokenizer_kwargs`: text cleaning only, no paths and no options that make transformers run code."""

    model_config = ConfigDict(extra="forbid")

    clean: Literal["canonicalize", "lower", "whitespace"] = "whitespace"
    strip_sep_token: bool = False


class Text(_Section):
    """open_clip's `text_cfg`."""

    context_length: Count = 77
    vocab_size: Count = 49408
    width: Count = 512
    heads: Count = 8
    layers: Count = 12
    hf_tokenizer_name: str | None = None
    tokenizer_mode: str | None = None
    tokenizer_kwargs: TokenizerOptions | None = None


class Model(_Section):
    """open_clip's model config."""

    embed_dim: Count
    vision_cfg: Vision
    text_cfg: Text
    quick_gelu: bool = False


class Header(_Section):
    """The header of a CLIP weights file: model config and preprocessing."""

    open_clip: Model
    image_size: Count
    mean: Channels
    std: Deviations
    resize: Literal["shortest", "longest", "squash"] = "shortest"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    @model_validator(mode="after")
    def _check_image_size(self) -> Header:
        if self.image_size != self.open_clip.vision_cfg.image_size:
            raise ValueError(
                f"image_size is {self.image_size}, but open_clip.vision_cfg.image_size is "
                f"{self.open_clip.vision_cfg.image_size}"
            )
        return self


def parse_header(header: Mapping[str, Any], where: str) -> Header:
    """Validate a header against `Header`.

    Args:
        header: the parsed "config" metadata of the file.
        where: the file, for the message.

    Raises:
        WeightsError: a key is missing or has an invalid value; the message names the file and up to three keys.
    """
    try:
        return Header.model_validate(dict(header))
    except ValidationError as error:
        problems = [(".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")) for e in error.errors()]
        shown = "; ".join(f"{key}: {message}" if key else message for key, message in problems[:3])
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise WeightsError(
            f'{where}: the "config" in its header does not describe a valid CLIP model: {shown}{more}. Check that the '
            "file is meant for this reward."
        ) from error
