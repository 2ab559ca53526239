"""Options of the hpsv2 reward, and its published weights. Importing this module imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from alignprop_core.specs import RewardConfig, WeightsFile

Version = Literal["2.0", "2.1"]
DEFAULT_VERSION: Version = "2.1"

WEIGHTS: dict[Version, WeightsFile] = {
    "2.0": WeightsFile(repository="xswu/HPSv2", file="HPS_v2_compressed.pt", license="Apache-2.0"),
    "2.1": WeightsFile(repository="xswu/HPSv2", file="HPS_v2.1_compressed.pt", license="Apache-2.0"),
}


def _as_text(value: object) -> object:
    """YAML reads an unquoted 2.1 as a number, and the original writes v2.1; both mean the version."""
    return str(value) if isinstance(value, float) else value.removeprefix("v") if isinstance(value, str) else value


class Hpsv2Config(RewardConfig):
    """Options of `hpsv2`."""

    version: Annotated[Version, BeforeValidator(_as_text)] = Field(
        default=DEFAULT_VERSION,
        description="Which weights: 2.1 (more and cleaner preference data) or 2.0 (the paper's, and AlignProp's).",
    )
    weights: str = Field(
        default="default",
        description='Weights: "default" (the published ones of that version), "starter", a file, hub:owner/name/file.',
    )
    preprocessing: Literal["official", "centre_crop"] = Field(
        default="official",
        description='"official": longest side to 224, black padding; "centre_crop": shortest side, as trainers do.',
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Arithmetic inside the model. float32 is exact; bfloat16 (autocast) is faster on a GPU.",
    )
