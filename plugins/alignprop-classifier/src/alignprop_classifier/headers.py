"""What a weights file or the JSON beside it says of a classifier, checked with the ranges of the options. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from alignprop_classifier.config import ClassifierConfig
from alignprop_core.errors import WeightsError

PICTURE_KEYS = ("image_size", "mean", "std", "interpolation", "crop", "fit")
"""Options that say how a picture is put before the network; a file may say them itself."""


def checked(values: Mapping[str, Any], where: str, own: Mapping[str, str] | None = None) -> ClassifierConfig:
    """Return the values as options; `WeightsError` that names the file (`where`) and the key if one is wrong.

    Args:
        values: options by name; None stands for one that is not given.
        where: the file, for the message.
        own: what the file itself calls an option, where it has another name for it.
    """
    try:
        return ClassifierConfig.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = str(first["loc"][0])
        says = "an entry is missing" if first["type"] == "missing" else first["msg"].removeprefix("Value error, ")
        raise WeightsError(
            f"{where}: {(own or {}).get(key, key)}: {says[0].lower()}{says[1:]} (it is {repr(values[key])[:80]}). "
            "Mend the file, or fetch it again."
        ) from error
