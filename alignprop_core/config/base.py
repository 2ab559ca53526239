"""What the run config's sections are made of: their base class, common types, and several problems reported at once."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Pixels = Annotated[int, Field(ge=8, multiple_of=8)]
"""A width or height: whole blocks of the smallest factor by which an autoencoder shrinks an image."""

Text = Annotated[str, StringConstraints(min_length=1)]
Positive = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """Common behaviour of all sections."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)
