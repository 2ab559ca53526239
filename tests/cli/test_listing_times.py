"""Listings answer at once. These tests run last, when the other processes of the tests have little left to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.registry.test_many_plugins import environment, fifty  # noqa: F401

pytestmark = pytest.mark.skipif(
    not hasattr(os, "wait4"), reason="measures processor time with os.wait4, which Windows lacks"
)


def answered(*arguments: str, below: float, site: Path | None = None) -> tuple[float, str]:
    """Return the processor time of a command in seconds, its best of twenty runs, and what it printed.

    Processor time of one thread is wall time on a machine that is not busy. Other processes only ever add to it, by
    up to a half where they share caches and clock rates, so the best run is the command's own time; once a run is
    below the limit there is no need for more. An installed package has its bytecode; here the first run writes it.
    """
    seconds = []
    while len(seconds) < 20 and min(seconds, default=below) >= below:
        process = subprocess.Popen(
            [sys.executable, "-c", "from alignprop_core.cli import main; main()", *arguments],
            env=environment(site), stdout=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        printed = process.stdout.read().decode()
        process.stdout.close()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        seconds.append(usage.ru_utime + usage.ru_stime)
    return min(seconds), printed


@pytest.mark.parametrize("command", ["--help", "plugins"])
def test_help_and_plugins_answer_in_half_a_second(command: str) -> None:
    assert answered(command, below=0.5)[0] < 0.5


def test_fifty_plugins_are_listed_in_seven_tenths_of_a_second(fifty: Path) -> None:  # noqa: F811
    seconds, printed = answered("rewards", "list", "--json", below=0.7, site=fifty)
    names = [reward["name"] for reward in json.loads(printed)]
    assert len([name for name in names if name.startswith("fake_")]) == 50
    assert seconds < 0.7
