"""Test support for plugins: conformance checks, test images, tiny pipelines and a two-step run.

pytest loads nothing from this package automatically. The complete conformance test of a reward is

    from alignprop_core.testing import RewardConformance

    class TestWarmth(RewardConformance):
        reward = "warmth"

and pytest fixtures are imported by name from `alignprop_core.testing.fixtures`. The public names below are loaded
lazily: only `RewardConformance` and the fixtures need pytest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

_PUBLIC = {
    "CHECKS": "alignprop_core.testing.suite",
    "Check": "alignprop_core.testing.suite",
    "CheckFailed": "alignprop_core.testing.subject",
    "NotApplicable": "alignprop_core.testing.subject",
    "RewardConformance": "alignprop_core.testing.conformance",
    "Subject": "alignprop_core.testing.subject",
    "Verdict": "alignprop_core.testing.suite",
    "natural_images": "alignprop_core.testing.images",
    "run_checks": "alignprop_core.testing.suite",
    "starter_images": "alignprop_core.testing.images",
    "tiny_pipeline": "alignprop_core.testing.pipelines",
    "train_two_steps": "alignprop_core.testing.runs",
}

if TYPE_CHECKING:
    from alignprop_core.testing.conformance import RewardConformance as RewardConformance
    from alignprop_core.testing.images import natural_images as natural_images
    from alignprop_core.testing.images import starter_images as starter_images
    from alignprop_core.testing.pipelines import tiny_pipeline as tiny_pipeline
    from alignprop_core.testing.runs import train_two_steps as train_two_steps
    from alignprop_core.testing.subject import CheckFailed as CheckFailed
    from alignprop_core.testing.subject import NotApplicable as NotApplicable
    from alignprop_core.testing.subject import Subject as Subject
    from alignprop_core.testing.suite import CHECKS as CHECKS
    from alignprop_core.testing.suite import Check as Check
    from alignprop_core.testing.suite import Verdict as Verdict
    from alignprop_core.testing.suite import run_checks as run_checks

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> object:
    """Import a public name from its module on first access."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'alignprop_core.testing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
