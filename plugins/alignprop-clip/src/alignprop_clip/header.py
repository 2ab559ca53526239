"""What a weights file says of itself in its header, held to what can be built and run. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from alignprop_core.errors import WeightsError

Count = Annotated[int, Field(gt=0, le=1 << 24)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Channels = Annotated[list[Number], Field(min_length=3, max_length=3)]


class _Part(BaseModel):
    """JSON as it is: "77" is no number. What stands beside the keys below is open_clip's to read."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class Vision(_Part):
    """open_clip's `vision_cfg`."""

    image_size: Count = 224
    patch_size: Count | list[Count] = 16
    width: Count = 768
    head_width: Count = 64
    layers: Count | list[Count] = 12
    # A name that says where it comes from ("hf-hub:...") would be looked up on the network.
    timm_model_name: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None


class TokenizerOptions(_Part):
    """open_clip's `tokenizer_kwargs`: how prompts are cleaned; no path, and nothing transformers would run."""

    model_config = ConfigDict(extra="forbid")

    clean: Literal["canonicalize", "lower", "whitespace"] = "whitespace"
    strip_sep_token: bool = False


class Text(_Part):
    """open_clip's `text_cfg`."""

    context_length: Count = 77
    vocab_size: Count = 49408
    width: Count = 512
    heads: Count = 8
    layers: Count = 12
    hf_tokenizer_name: str | None = None
    tokenizer_mode: str | None = None
    tokenizer_kwargs: TokenizerOptions | None = None


class Model(_Part):
    """open_clip's model config."""

    embed_dim: Count
    vision_cfg: Vision
    text_cfg: Text
    quick_gelu: bool = False


class Header(_Part):
    """The header of a CLIP weights file."""

    open_clip: Model
    image_size: Count
    mean: Channels
    std: Annotated[list[Annotated[Number, Field(gt=0)]], Field(min_length=3, max_length=3)]
    resize: Literal["shortest", "longest", "squash"] = "shortest"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    @model_validator(mode="after")
    def _one_size(self) -> Header:
        if self.image_size != self.open_clip.vision_cfg.image_size:
            raise ValueError(
                f"image_size is {self.image_size}, and {self.open_clip.vision_cfg.image_size} in open_clip.vision_cfg"
            )
        return self


def read(header: Mapping[str, Any], where: str) -> Header:
    """Hold a header to the above.

    Args:
        header: the parsed "config".
        where: the file, for the message.

    Raises:
        WeightsError: a key is missing or has a value that cannot be; the message names file and keys.
    """
    try:
        return Header.model_validate(dict(header))
    except ValidationError as error:
        found = [(".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")) for e in error.errors()]
        wrong = "; ".join(f"{key}: {message}" if key else message for key, message in found[:3])
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise WeightsError(
            f'{where}: the "config" in its header describes no CLIP model that can be built: {wrong}{more}. Is the '
            "file meant for this reward?"
        ) from error
