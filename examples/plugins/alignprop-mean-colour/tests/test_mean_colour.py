"""`mean_colour` keeps the promises alignprop relies on."""

from alignprop_core.testing import RewardConformance


class TestMeanColour(RewardConformance):
    reward = "mean_colour"
