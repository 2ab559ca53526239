"""The processor time of command lines, on whatever machine the tests run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

REFERENCE = "import typer, pydantic, importlib.metadata"
"""What every command line with typer and pydantic pays for."""
QUIET = 0.16
"""Seconds of processor time that REFERENCE takes on the quiet machine where `alignprop plugins` takes 0.35 s."""
COMMAND = "from alignprop_core.cli import main; main()"


def timed(python: str, code: str, arguments: tuple[str, ...], environment: Mapping[str, str]) -> tuple[float, str]:
    """Return the processor time that Python code takes in a process of its own, in seconds, and what it printed."""
    process = subprocess.Popen([python, "-c", code, *arguments], env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    printed = process.stdout.read().decode()
    process.stdout.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime, printed


def answered(*arguments: str, below: float, python: str, environment: Mapping[str, str]) -> tuple[float, str]:
    """Return the processor time of a command line of alignprop, in seconds of a quiet machine, and what it printed.

    The processor time of one thread is its wall time on a machine that is not busy; on a busy one it can double, where
    processes share caches and clock rates. So the reference and the command run in turns; the best run of each is its
    own time at the machine's present speed, and their ratio times QUIET is the result. Three turns at least: a single
    slow run of the reference lets no slow command pass. Twenty at most: none follows once the result is below the
    limit. An installed package has its bytecode; here the first run writes it.
    """
    command = reference = result = float("inf")
    printed = ""
    for turn in range(20):
        reference = min(reference, timed(python, REFERENCE, (), environment)[0])
        seconds, printed = timed(python, COMMAND, arguments, environment)
        command = min(command, seconds)
        result = command / reference * QUIET
        if turn >= 2 and result < below:
            break
    return result, printed
