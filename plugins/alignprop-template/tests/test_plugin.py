"""What the plugin adds to the command line; tests/test_new_reward.py builds and installs what the command writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import alignprop_template
from alignprop_core.cli import run


def test_the_hook_imports_no_torch() -> None:
    code = (
        "import sys, alignprop_template; alignprop_template.alignprop_register_commands(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_help_lists_the_command_with_its_summary(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (spec,) = alignprop_template.alignprop_register_commands()
    assert run(["rewards", "--help"]) == 0
    assert any(" new " in line and spec.summary in line for line in capsys.readouterr().out.splitlines())
    assert run(["rewards", "new", "--help"]) == 0
    assert spec.summary in capsys.readouterr().out


def test_it_writes_a_plugin_and_says_what_comes_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    assert run(["rewards", "new", "warm_colors", "--to", str(folder)]) == 0
    assert (folder / "pyproject.toml").is_file()
    assert "alignprop rewards check warm_colors" in capsys.readouterr().out
    assert run(["rewards", "new", "warm_colors", "--to", str(folder)]) == 2
