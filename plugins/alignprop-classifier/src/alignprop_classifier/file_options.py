"""Options stored in a weights header or a preprocessor config, validated like the options of a run. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from alignprop_classifier.config import ClassifierConfig
from alignprop_core.errors import WeightsError

PREPROCESSING_KEYS = ("image_size", "mean", "std", "interpolation", "crop", "fit")
"""Options of the preprocessing, which a weights file may store in its header."""


def options_from_file(
    values: Mapping[str, Any], where: str, file_keys: Mapping[str, str] | None = None
) -> ClassifierConfig:
    """Validate values read from a file as options.

    Args:
        values: values by option name; None for an option that the file does not set.
        where: the file, for the message.
        file_keys: option name -> key in the file, for options whose key differs.

    Raises:
        WeightsError: a value is invalid; the message names the file and the key.
    """
    try:
        return ClassifierConfig.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = str(first["loc"][0])
        problem = "an entry is missing" if first["type"] == "missing" else first["msg"].removeprefix("Value error, ")
        raise WeightsError(
            f"{where}: {(file_keys or {}).get(key, key)}: {problem[0].lower()}{problem[1:]} (got "
            f"{repr(values[key])[:80]}). Fix the file, or fetch it again."
        ) from error
