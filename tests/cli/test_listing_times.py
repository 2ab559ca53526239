"""Listings answer at once. These tests run last, when the other processes of the tests have little left to do."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.registry.test_many_plugins import environment, fifty  # noqa: F401
from tests.support.timing import answered

pytestmark = pytest.mark.skipif(
    not hasattr(os, "wait4"), reason="measures processor time with os.wait4, which Windows lacks"
)


@pytest.mark.parametrize("command", ["--help", "plugins"])
def test_help_and_plugins_answer_in_half_a_second(command: str) -> None:
    assert answered(command, below=0.5, python=sys.executable, environment=environment())[0] < 0.5


def test_fifty_plugins_are_listed_in_seven_tenths_of_a_second(fifty: Path) -> None:  # noqa: F811
    listing = ("rewards", "list", "--json")
    seconds, printed = answered(*listing, below=0.7, python=sys.executable, environment=environment(fifty))
    names = [reward["name"] for reward in json.loads(printed)]
    assert len([name for name in names if name.startswith("fake_")]) == 50
    assert seconds < 0.7
