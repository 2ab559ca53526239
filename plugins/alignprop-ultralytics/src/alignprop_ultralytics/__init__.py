"""YOLO detectors for alignprop's counting rewards, in a separate distribution because ultralytics is AGPL-3.0.

Imports neither torch nor ultralytics.
"""

from __future__ import annotations

from collections.abc import Iterable

from alignprop_core.hookspecs import hookimpl
from alignprop_core.specs import WeightsFile, WeightsSpec
from alignprop_counting import DetectorSpec

_SIZES = "nsmlx"
ARCHITECTURES = tuple(f"{family}{size}" for family in ("yolov8", "yolo11", "yolo26") for size in _SIZES) + tuple(
    f"yolov10{size}" for size in "nsmblx"
)
"""Names of the detection architectures in ultralytics."""

_GET = (
    "Ultralytics publishes pickles. Download one you trust (such as yolo11n.pt), convert it with "
    "`python -m alignprop_ultralytics.convert yolo11n.pt yolo11n.safetensors`, and set `weights` to the new file."
)

_LICENSE = "AGPL-3.0-only"


@hookimpl
def alignprop_counting_detectors() -> Iterable[DetectorSpec]:
    """Yield `yolo` for files that name their architecture, and every architecture for files that do not."""
    yield _spec("yolo", "YOLO from a file that names its architecture (a converted checkpoint, or the set `starter`).")
    for name in ARCHITECTURES:
        yield _spec(name, f"{name.replace('yolo', 'YOLO')}, trained on COCO or on the classes in the file's header.")


def _spec(name: str, summary: str) -> DetectorSpec:
    return DetectorSpec(
        name=name,
        summary=summary,
        factory="alignprop_ultralytics.loading:build_detector",
        source="https://github.com/ultralytics/ultralytics",
        license=_LICENSE,
        get_weights=_GET,
    )


@hookimpl
def alignprop_register_weights() -> Iterable[WeightsSpec]:
    """Return the set `starter` for the detector `yolo`; the file names its own architecture."""
    file = WeightsFile(
        file="weights/yolo.safetensors",
        sha256="ce1fa684098b0054bf39c12a42bf7300d53c3d3ecf9863061a59b7550db78872",
        bytes=4_449_868,
        license=_LICENSE,
    )
    return [
        WeightsSpec(
            name="starter",
            reward="yolo",  # counting rewards look up weight sets by the name of the detector
            summary="A small YOLO26 that detects the 51 animals in the starter's scenes, and nothing else.",
            path=f"alignprop_ultralytics:{file.file}",
            license=_LICENSE,
            source="https://github.com/alignprop/alignprop/tree/main/plugins/alignprop-ultralytics",
            weights=(file,),
        )
    ]
