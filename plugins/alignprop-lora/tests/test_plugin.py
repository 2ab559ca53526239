"""What the plugin adds to the command line: a group with its sentence, five commands, and earlier names."""

from __future__ import annotations

import subprocess
import sys

import pytest

import alignprop_lora
from alignprop_core.cli import run

COMMANDS = ["info", "convert", "scale", "merge", "fuse"]


def test_the_hook_imports_no_torch() -> None:
    code = "import sys, alignprop_lora; alignprop_lora.alignprop_register_commands(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_help_lists_the_group_and_its_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    sentence = "Inspect, convert, scale, merge and fuse LoRA files."
    assert run(["--help"]) == 0
    assert any("lora" in line and sentence in line for line in capsys.readouterr().out.splitlines())
    assert run(["lora", "--help"]) == 0
    listed = capsys.readouterr().out
    assert sentence in listed
    summaries = {spec.name: spec.summary for spec in alignprop_lora.alignprop_register_commands()}
    assert summaries.keys() == {f"lora {name}" for name in COMMANDS}
    for name in COMMANDS:
        assert any(name in line and summaries[f"lora {name}"] in line for line in listed.splitlines())


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_starts_with_its_summary(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["lora", name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"Usage: alignprop lora {name} " in shown
    assert {spec.name: spec.summary for spec in alignprop_lora.alignprop_register_commands()}[f"lora {name}"] in shown


@pytest.mark.parametrize(("earlier", "today"), [("mix", "merge"), ("bake", "fuse")])
def test_an_earlier_command_name_is_answered_with_todays(
    earlier: str, today: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["lora", earlier, "a", "b"]) == 2
    assert capsys.readouterr().err == f"error: `alignprop lora {earlier}` is now `alignprop lora {today}`.\n"
