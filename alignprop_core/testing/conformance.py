"""The class a plugin's test subclasses. Imports pytest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch

from alignprop_core.testing.subject import DEFAULT_PROMPTS, Subject
from alignprop_core.testing.suite import CHECKS, Check, judge


class RewardConformance:
    """All conformance checks of a reward as tests, one each.

        class TestWarmth(RewardConformance):
            reward = "warmth"
            options = {"margin": 0.25}

    Options that need a fixture (a file of weights, best made once a module) come from a fixture of the subclass:

        @pytest.fixture
        def reward_options(self, weights: Path) -> dict[str, object]:
            return {"weights": str(weights)}

    Attributes:
        reward: the reward's name.
        options: its options, as in a run config.
        prompts: prompts to try it with; cycled over three pictures.
        metadata: what a prompt file would say beside each.
        skip: name of a check -> why it is left out, such as {"range": "random weights"}.
        gradient_tolerance: largest relative error of the gradient against finite differences.
        gradient_dtype: float64, or float32 for a reward that cannot compute in float64.
    """

    reward: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    prompts: ClassVar[Sequence[str]] = DEFAULT_PROMPTS
    metadata: ClassVar[Sequence[Mapping[str, Any]]] = ()
    skip: ClassVar[Mapping[str, str]] = {}
    gradient_tolerance: ClassVar[float] = 1e-3
    gradient_dtype: ClassVar[torch.dtype] = torch.float64
    _subject: ClassVar[Subject | None] = None

    @pytest.fixture
    def reward_options(self) -> Mapping[str, Any]:
        """Return the options; override it where they need other fixtures."""
        return self.options

    @pytest.fixture
    def subject(self, reward_options: Mapping[str, Any]) -> Subject:
        """Return the reward under test; built once for all checks, again where the options differ."""
        kind = type(self)
        known: Subject | None = kind.__dict__.get("_subject")
        if known is None or known.options != reward_options:
            known = Subject(
                name=self.reward,
                options=reward_options,
                prompts=self.prompts,
                metadata=self.metadata,
                gradient_tolerance=self.gradient_tolerance,
                gradient_dtype=self.gradient_dtype,
            )
            kind._subject = known
        return known

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
    def test_keeps_its_promise(self, subject: Subject, check: Check) -> None:
        """The reward keeps one promise; its name is the test's id, the reason is in the message."""
        if check.name in self.skip:
            pytest.skip(self.skip[check.name])
        _ = subject.reward
        verdict = judge(check, subject)
        if verdict.status == "not applicable":
            pytest.skip(verdict.message)
        if verdict.status == "broken":
            pytest.fail(
                f"{self.reward}: {check.promise}\n{verdict.message}\n{verdict.traceback}".rstrip(), pytrace=False
            )
