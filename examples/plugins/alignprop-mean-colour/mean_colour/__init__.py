"""Distance of the mean colour from a target colour, as a reward. Imports no torch."""

from collections.abc import Iterable

from pydantic import Field

from alignprop_core import RewardConfig, RewardSpec, hookimpl


class MeanColourConfig(RewardConfig):
    """Options of `mean_colour`."""

    colour: tuple[float, float, float] = Field(
        default=(0.9, 0.5, 0.2), description="Target colour: red, green, blue, each 0 to 1."
    )


@hookimpl
def alignprop_register_rewards() -> Iterable[RewardSpec]:
    """Register `mean_colour`."""
    return [
        RewardSpec(
            name="mean_colour",
            summary="Negative distance of an image's mean colour from a target colour.",
            factory="mean_colour.reward:MeanColour",
            config="mean_colour:MeanColourConfig",
            api_version=1,
            typical_range=(-1.0, 0.0),
            license="Apache-2.0",
        )
    ]
