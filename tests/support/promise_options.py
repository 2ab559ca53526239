"""Options of the rewards in tests.support.promise_rewards: without torch, as they should be."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field, field_validator

from alignprop_core.specs import RewardConfig


class Options(RewardConfig):
    gain: float = Field(default=1.0, description="Factor.")


class Silent(RewardConfig):
    gain: float = 1.0


class Drifting(Options):
    @field_validator("gain")
    @classmethod
    def _double(cls, value: float) -> float:
        return 2 * value


class Lenient(Options):
    model_config = ConfigDict(extra="ignore")


class Unwritable(Options):
    anything: Any = Field(default=object, description="What JSON has no word for.")
