"""The base class for the conformance tests of a plugin's reward. Imports pytest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch

from alignprop_core.testing.subject import DEFAULT_PROMPTS, Subject
from alignprop_core.testing.suite import CHECKS, Check, judge


class RewardConformance:
    """All conformance checks of a reward, one test per check.

        class TestWarmth(RewardConformance):
            reward = "warmth"
            options = {"margin": 0.25}

    Options that need a fixture, such as a weights file, come from a fixture of the subclass:

        @pytest.fixture
        def reward_options(self, weights: Path) -> dict[str, object]:
            return {"weights": str(weights)}

    Attributes:
        reward: the reward's name.
        options: its options, as in a run config.
        prompts: prompts to score with, repeated as needed for three images.
        metadata: the prompts' metadata, as in a JSONL prompt file.
        skip: name of a check -> why it is skipped, such as {"range": "random weights"}.
        gradient_tolerance: maximum relative error of the gradient against finite differences.
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
        """Return the options; override this fixture if they depend on other fixtures."""
        return self.options

    @pytest.fixture
    def subject(self, reward_options: Mapping[str, Any]) -> Subject:
        """Return the reward under test, built once per class and set of options."""
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
    def test_contract(self, subject: Subject, check: Check) -> None:
        """Run one conformance check; its name is the test's id."""
        if check.name in self.skip:
            pytest.skip(self.skip[check.name])
        _ = subject.reward
        verdict = judge(check, subject)
        if verdict.status == "not applicable":
            pytest.skip(verdict.message)
        if verdict.status == "failed":
            text = f"{self.reward}: {check.description}\n{verdict.message}\n{verdict.traceback}"
            pytest.fail(text.rstrip(), pytrace=False)
