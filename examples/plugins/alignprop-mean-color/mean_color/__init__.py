"""Distance of the mean color from a target color, as a reward. Imports no torch."""

from collections.abc import Iterable

from pydantic import Field

from alignprop_core import RewardConfig, RewardSpec, hookimpl


class MeanColorConfig(RewardConfig):
    """Options of `mean_color`."""

    color: tuple[float, float, float] = Field(
        default=(0.9, 0.5, 0.2), description="Target color: red, green, blue, each 0 to 1."
    )


@hookimpl
def alignprop_register_rewards() -> Iterable[RewardSpec]:
    """Register `mean_color`."""
    return [
        RewardSpec(
            name="mean_color",
            summary="Negative distance of an image's mean color from a target color.",
            factory="mean_color.reward:MeanColor",
            config="mean_color:MeanColorConfig",
            api_version=1,
            typical_range=(-1.0, 0.0),
            license="Apache-2.0",
        )
    ]
