"""The shipped conformance checks on all three rewards."""

from alignprop_core.testing import RewardConformance


class TestJpegCompressibility(RewardConformance):
    reward = "jpeg_compressibility"


class TestJpegIncompressibility(RewardConformance):
    reward = "jpeg_incompressibility"


class TestJpegBytes(RewardConformance):
    reward = "jpeg_bytes"
