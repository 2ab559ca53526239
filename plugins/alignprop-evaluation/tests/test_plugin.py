"""What the plugin adds: a command, and the callback of runs with `evaluation.every`.

tests/training/test_early_stopping.py and test_resume.py train with it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import alignprop_evaluation
from alignprop_core import cli
from alignprop_core.config.load import load_config
from alignprop_core.registry.registry import Registry
from alignprop_core.training.plugin_callbacks import EARLY_STOPPING, named_callbacks
from alignprop_evaluation.while_training import HeldOutEvaluation


def test_the_hooks_and_the_commands_module_import_no_torch() -> None:
    code = (
        "import sys, alignprop_evaluation as plugin, alignprop_evaluation.command; "
        "plugin.alignprop_register_callbacks(); plugin.alignprop_register_commands(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_help_lists_the_command_with_its_summary(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (spec,) = alignprop_evaluation.alignprop_register_commands()
    assert cli.run(["--help"]) == 0
    assert any(" evaluate " in line and spec.summary in line for line in capsys.readouterr().out.splitlines())
    assert cli.run(["evaluate", "--help"]) == 0
    assert spec.summary in capsys.readouterr().out


def test_the_callback_has_the_name_that_the_core_looks_for() -> None:
    known = Registry.from_plugins({"alignprop-evaluation": alignprop_evaluation})
    (callback,) = named_callbacks([EARLY_STOPPING], known)
    assert isinstance(callback, HeldOutEvaluation)


def test_a_run_that_names_it_as_a_tracker_trains_without_evaluating(tmp_path: Path) -> None:
    from alignprop_core.testing import tiny_pipeline
    from alignprop_core.training.trainer import Trainer

    tiny_pipeline().save_pretrained(tmp_path / "model")
    data = {
        "model": {"base": str(tmp_path / "model")},
        "prompts": {"train": ["a fox"]},
        "sampling": {"steps": 1},
        "training": {"steps": 1, "batch_size": 1, "device": "cpu", "trackers": [EARLY_STOPPING]},
        "previews": {"prompts": []},
        "output": str(tmp_path / "run"),
    }
    known = Registry.from_plugins({"alignprop-evaluation": alignprop_evaluation})
    rewards = {"red": lambda images, prompts: images[:, 0].mean((1, 2))}
    known = known.with_rewards(rewards)
    run = Trainer(load_config(data, registry=known), registry=known).train()
    assert len(run.metrics) == 1
    assert run.evaluations == []
