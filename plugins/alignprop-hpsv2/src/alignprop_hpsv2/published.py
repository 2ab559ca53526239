"""The published weights of HPSv2, by version. Imports no torch."""

from __future__ import annotations

from typing import Literal

from alignprop_core.specs import WeightsFile

Version = Literal["2.0", "2.1"]
DEFAULT_VERSION: Version = "2.1"

WEIGHTS: dict[Version, WeightsFile] = {
    "2.0": WeightsFile(repository="xswu/HPSv2", file="HPS_v2_compressed.pt", license="Apache-2.0"),
    "2.1": WeightsFile(repository="xswu/HPSv2", file="HPS_v2.1_compressed.pt", license="Apache-2.0"),
}
