"""The rewards keep alignprop's promises."""

from alignprop_core.testing import RewardConformance


class TestJpegCompressibility(RewardConformance):
    reward = "jpeg_compressibility"


class TestJpegIncompressibility(RewardConformance):
    reward = "jpeg_incompressibility"


class TestJpegBytes(RewardConformance):
    reward = "jpeg_bytes"
