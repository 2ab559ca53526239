"""The shipped conformance checks on `scene_accuracy`."""

from alignprop_core.testing import RewardConformance


class TestSceneAccuracy(RewardConformance):
    reward = "scene_accuracy"
    options = {"attribute": "all"}  # noqa: RUF012
