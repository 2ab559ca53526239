"""Command lines in processes of their own, and runs of several processes, started as torchrun starts them."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support import ROOT

if TYPE_CHECKING:
    from alignprop_core.config.sections import RunConfig

FORKS = """\
import json
import os
import sys
import traceback
import warnings

import alignprop_core.config.load
from alignprop_core.cli import main

assert not {"torch", "huggingface_hub"} & sys.modules.keys(), "only some commands import these"
for line in sys.stdin:
    arguments, environment, strict, folder = json.loads(line)
    if not (child := os.fork()):
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            os.dup2(os.open(f"{folder}/{name}", os.O_RDWR | os.O_CREAT), number)
        sys.stdin = open(0)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[1:1] = environment["PYTHONPATH"].split(os.pathsep)
        if strict:
            warnings.simplefilter("error")
        sys.argv = ["alignprop", *arguments]
        code = 1
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs each command line of its input in a process of its own, for which it has imported what all commands import."""


@cache
def _forks() -> subprocess.Popen[str]:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    server = subprocess.Popen(
        [sys.executable, "-c", FORKS], cwd=ROOT, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.communicate)
    return server


def command_line(
    arguments: tuple[str, ...], environment: Mapping[str, str], *, strict: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run `alignprop` in a process of its own with an environment, which has a PYTHONPATH.

    It is a fork of a process that has imported what all commands import, which takes them most of their time. The
    search for plugins and what a command itself imports are its own. `strict` makes its warnings errors.
    """
    server = _forks()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        server.stdin.write(json.dumps([arguments, dict(environment), strict, folder]) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        texts = [(Path(folder) / name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(arguments, code, *texts)


SCRIPT = """\
from pathlib import Path

from alignprop_core.config.sections import RunConfig
from alignprop_core.training.trainer import Trainer
from {module} import registry

{before}
trainer = Trainer(RunConfig.model_validate_json(Path({config!r}).read_text()), registry=registry())
assert trainer.processes.num_processes == {processes}
trainer.train()
{after}
"""


def train_in_processes(
    config: RunConfig,
    *,
    module: str = "tests.support.toy_rewards",
    before: str = "",
    after: str = "",
    processes: int = 2,
) -> Path:
    """Train on a config in several processes on the CPU; returns the run folder.

    Args:
        config: the run config.
        module: name of a module whose `registry()` has the config's rewards.
        before: Python code that each process runs before it builds its `trainer`.
        after: Python code that each process runs after `trainer.train()`.
        processes: number of processes.
    """
    folder = Path(config.output)
    file, script = folder.with_suffix(".json"), folder.with_suffix(".py")
    file.write_text(config.model_dump_json())
    script.write_text(SCRIPT.format(module=module, config=str(file), processes=processes, before=before, after=after))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), str(script)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder
