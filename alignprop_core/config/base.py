"""Base class and common types of the run config's sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from alignprop_core.validation import explain, invalid

Pixels = Annotated[int, Field(ge=8, multiple_of=8)]
"""A width or height: whole blocks of the smallest factor by which an autoencoder shrinks an image."""

Text = Annotated[str, StringConstraints(min_length=1)]
Positive = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """Common behavior of all sections."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )


S = TypeVar("S", bound=Section)


def as_section(kind: type[S], value: S | Mapping[str, Any] | None, where: str, context: Any = None) -> S:
    """Return a section given from Python: as it is, from a mapping of its keys, or its defaults for None.

    Raises:
        ConfigError: a key or value is wrong; one line for each, with the key's path below `where`.
    """
    if isinstance(value, kind):
        return value
    try:
        return kind.model_validate(dict(value or {}), context=context)
    except ValidationError as error:
        raise invalid(explain(error, kind, where), where) from error
