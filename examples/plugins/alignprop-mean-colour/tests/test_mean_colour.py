"""`mean_colour` passes the conformance checks."""

from alignprop_core.testing import RewardConformance


class TestMeanColour(RewardConformance):
    reward = "mean_colour"
