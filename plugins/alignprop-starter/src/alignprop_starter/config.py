"""Options of `scene_accuracy`. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from alignprop_core.specs import RewardConfig


class SceneAccuracyConfig(RewardConfig):
    """Options of `scene_accuracy`."""

    attribute: Literal["species", "number", "style", "background", "all"] = Field(
        default="species",
        description="Attribute compared with the prompt; `all` compares all that the prompt names.",
    )
