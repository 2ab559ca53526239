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

# Every command line with typer and pydantic pays for these imports. They take QUIET seconds of processor time on the
# quiet machine on which `alignprop plugins` takes 0.35 s.
REFERENCE = "import typer, pydantic, importlib.metadata"
QUIET = 0.16
COMMAND = "from alignprop_core.cli import main; main()"


def timed(code: str, *arguments: str, site: Path | None = None) -> tuple[float, str]:
    """Return the processor time that Python code takes in a process of its own, in seconds, and what it printed."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environment(*[site] if site else []), stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    printed = process.stdout.read().decode()
    process.stdout.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime, printed


def answered(*arguments: str, below: float, site: Path | None = None) -> tuple[float, str]:
    """Return the processor time of a command, in seconds of a quiet machine, and what it printed.

    The processor time of one thread is its wall time on a machine that is not busy; on a busy one it can double, where
    processes share caches and clock rates. So the reference and the command run in turns; the best run of each is its
    own time at the machine's present speed, and their ratio times QUIET is the result. Three turns at least: a single
    slow run of the reference lets no slow command pass. Twenty at most: none follows once the result is below the
    limit. An installed package has its bytecode; here the first run writes it.
    """
    command = reference = result = float("inf")
    printed = ""
    for turn in range(20):
        reference = min(reference, timed(REFERENCE, site=site)[0])
        seconds, printed = timed(COMMAND, *arguments, site=site)
        command = min(command, seconds)
        result = command / reference * QUIET
        if turn >= 2 and result < below:
            break
    return result, printed


@pytest.mark.parametrize("command", ["--help", "plugins"])
def test_help_and_plugins_answer_in_half_a_second(command: str) -> None:
    assert answered(command, below=0.5)[0] < 0.5


def test_fifty_plugins_are_listed_in_seven_tenths_of_a_second(fifty: Path) -> None:  # noqa: F811
    seconds, printed = answered("rewards", "list", "--json", below=0.7, site=fifty)
    names = [reward["name"] for reward in json.loads(printed)]
    assert len([name for name in names if name.startswith("fake_")]) == 50
    assert seconds < 0.7
