"""`mean_color` passes the conformance checks."""

from alignprop_core.testing import RewardConformance


class TestMeanColor(RewardConformance):
    reward = "mean_color"
