"""Object counts as rewards, with a hook for detectors of other plugins. Imports no torch.

A plugin provides a detector with

    from alignprop_core.hookspecs import hookimpl
    from alignprop_counting import DetectorSpec

    @hookimpl
    def alignprop_counting_detectors():
        return [DetectorSpec(name="my_detector", factory="my_plugin.detector:build", ...)]
"""

from __future__ import annotations

from collections.abc import Iterable

from alignprop_core.hookspecs import hookimpl, hookspec
from alignprop_core.specs import PromptSpec, RewardSpec, WeightsFile
from alignprop_counting.specs import DETECTORS_HOOK, DetectorSpec

__all__ = ["DETECTORS_HOOK", "DetectorSpec"]

RTDETR_WEIGHTS = WeightsFile(repository="PekingU/rtdetr_r50vd", file="model.safetensors", license="Apache-2.0")
DETR_WEIGHTS = WeightsFile(repository="facebook/detr-resnet-50", file="model.safetensors", license="Apache-2.0")

_RTDETR = "Zhao et al., DETRs Beat YOLOs on Real-time Object Detection (RT-DETR), arXiv:2304.08069"
_TRANSFORMERS = "https://github.com/huggingface/transformers"


@hookspec
def alignprop_counting_detectors() -> Iterable[DetectorSpec]:  # type: ignore[empty-body]
    """Return the detectors of this plugin."""


@hookimpl(specname=DETECTORS_HOOK)
def alignprop_detectors_of_transformers() -> Iterable[DetectorSpec]:
    """Return RT-DETR and DETR."""
    factory = "alignprop_counting.loading:transformers_detector"
    return [
        DetectorSpec(
            name="rtdetr",
            summary="RT-DETR; the default file is R50vd at 640 px, trained on COCO (80 classes).",
            factory=factory,
            source=_TRANSFORMERS,
            license="Apache-2.0",
            weights=(RTDETR_WEIGHTS,),
        ),
        DetectorSpec(
            name="detr",
            summary="DETR; the default file is R50 at 800 px, trained on COCO (80 classes); needs the extra detr.",
            factory=factory,
            source=_TRANSFORMERS,
            license="Apache-2.0",
            weights=(DETR_WEIGHTS,),
        ),
    ]


def _reward(name: str, summary: str, config: str, low: float, unit: str, measure: str = "") -> RewardSpec:
    return RewardSpec(
        name=name,
        summary=summary,
        factory=f"alignprop_counting.reward:{''.join(part.title() for part in name.split('_'))}",
        config=f"alignprop_counting.config:{config}",
        differentiable=bool(measure),
        needs_prompts=True,
        unit=unit,
        typical_range=(low, 0.0 if measure else 1.0),
        evaluate_with=(measure,) if measure else (),
        source=_TRANSFORMERS,
        citation=_RTDETR,
        license="Apache-2.0",
        weights=(RTDETR_WEIGHTS,),
    )


@hookimpl
def alignprop_register_rewards() -> Iterable[RewardSpec]:
    """Return the differentiable rewards, and a true measure for each."""
    return [
        _reward(
            "object_count",
            "The requested number of objects of a class: minus the Huber distance of the soft count.",
            "ObjectCountConfig",
            -4.0,
            "objects",
            "hard_count",
        ),
        _reward(
            "object_presence",
            "Objects of the requested classes are present: log-probability of the best detection.",
            "PresenceConfig",
            -8.0,
            "log-probability",
            "hard_presence",
        ),
        _reward(
            "object_absence",
            "Objects of unwanted classes are absent: log of 1 - probability of the best detection.",
            "AbsenceConfig",
            -8.0,
            "log-probability",
            "hard_absence",
        ),
        _reward(
            "hard_count",
            "Whether the detector reports exactly the requested numbers.",
            "HardCountConfig",
            0.0,
            "fraction",
        ),
        _reward(
            "hard_presence",
            "Fraction of the requested classes that the detector reports.",
            "PresenceConfig",
            0.0,
            "fraction",
        ),
        _reward(
            "hard_absence",
            "Fraction of the unwanted classes that the detector does not report.",
            "AbsenceConfig",
            0.0,
            "fraction",
        ),
    ]


@hookimpl
def alignprop_register_prompts() -> Iterable[PromptSpec]:
    """Return prompts for counted objects of COCO classes."""
    return [
        PromptSpec(
            name=f"counting/{name}",
            summary=f"One to five objects of {classes} classes of COCO{note}, with object and number in the metadata.",
            path=f"alignprop_counting:prompts/{name}.jsonl",
            size=size,
            license="Apache-2.0",
        )
        for name, size, classes, note in (
            ("coco_objects", 30, 30, ""),
            ("eval_coco_objects", 40, 8, " that the first set lacks"),
        )
    ]
