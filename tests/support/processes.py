"""Runs of several processes, started as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from alignprop_core.config.sections import RunConfig
from tests.support import ROOT

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
