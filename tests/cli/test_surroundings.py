"""Commands and what surrounds them: closed streams, variables of other programs, Ctrl-C, a narrow terminal."""

from __future__ import annotations

import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

import alignprop_core
from alignprop_core.cli import run
from alignprop_core.devices import processes
from alignprop_core.evaluation.progress import progress_bar
from tests.support.toy_runs import toy_data

INTERRUPTING = """
calls = 0

def red(images):
    global calls
    calls += 1
    if calls > 3:  # the trial and two steps
        raise KeyboardInterrupt
    return images[:, 0].mean((1, 2))
"""


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&- <&-"])
def test_a_command_runs_with_closed_streams(closed: str) -> None:
    command = f'"{sys.executable}" -m alignprop_core rewards list {closed}'
    assert subprocess.run(["sh", "-c", command], capture_output=closed == "2>&-").returncode == 0


def test_variables_of_a_launcher_without_a_launcher_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.warns(UserWarning, match="WORLD_SIZE and LOCAL_RANK in the environment, but no launcher"):
        assert processes(cpu=True).num_processes == 1
    assert not {"WORLD_SIZE", "LOCAL_RANK"} & os.environ.keys()


@pytest.mark.parametrize(
    ("own", "loaded", "expected"), [(None, False, "PASSIVE"), ("ACTIVE", False, "ACTIVE"), (None, True, None)]
)
def test_threads_wait_passively_unless_the_user_chose(
    own: str | None, loaded: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", own or "")
    if own is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", sys)
        if not loaded:
            patch.delitem(sys.modules, "torch")
        runpy.run_path(str(alignprop_core.__file__), run_name="alignprop_core")
    assert os.environ.get("OMP_WAIT_POLICY") == expected


def test_ctrl_c_says_where_the_state_is_and_how_to_resume(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "red.py").write_text(INTERRUPTING)
    data: dict[str, Any] = toy_data(tiny_model, tmp_path, rewards=[{"name": f"{tmp_path / 'red.py'}:red"}])
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(data))
    assert run(["train", str(config)]) == 130
    printed = capsys.readouterr().err
    output = tmp_path / "run"
    (state,) = (output / "checkpoints").iterdir()
    assert "The run was interrupted after 2 of 6 steps. That state is saved in" in printed
    assert str(state) in printed
    assert f"alignprop train {output / 'config.yaml'} --resume latest" in printed
    assert printed.endswith("\ninterrupted\n")
    assert "Traceback" not in printed


def test_the_bar_is_complete_at_80_columns_and_values_are_below() -> None:
    written = io.StringIO()
    bar = progress_bar(Console(file=written, force_terminal=True, width=80, color_system=None, legacy_windows=False))
    values = ["total 0.5231", "clip_score 0.2731 61%", "jpeg_compressibility -5.3 30%", "hpsv2 0.25 9%"]
    bar.add_task("training", total=1000, completed=400, status="\n".join(f"  {value}" for value in values))
    with bar:
        bar.refresh()
    lines = [line.rpartition("\x1b[2K")[2].rstrip() for line in written.getvalue().splitlines()]
    first = max(number for number, line in enumerate(lines) if line.startswith("training"))
    assert "400/1000" in lines[first]
    assert lines[first].rpartition("left ")[2] in ("-:--:--", "0:00:00")
    assert len(lines[first]) <= 80
    assert [line.strip() for line in lines[first + 1 : first + 5]] == values


def test_missing_weights_of_all_rewards_are_reported_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("alignprop_hpsv2")
    pytest.importorskip("alignprop_aesthetic")
    pytest.importorskip("alignprop_starter")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    data = {"model": {"base": "starter"}, "prompts": {"train": ["a fox"]}, "output": str(tmp_path / "run")}
    data["rewards"] = [{"name": "hpsv2"}, {"name": "aesthetic"}]
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(data))
    assert run(["train", str(config), "--dry-run"]) == 2
    printed = capsys.readouterr().err
    for words in (
        "rewards.0.options.weights",
        "rewards.1.options.weights",
        "(4 MB)",
        "fetch --config",
        "weights: starter",
    ):
        assert words in printed
    assert run(["rewards", "fetch", "--config", str(config)]) == 2
    assert "HPS_v2.1_compressed.pt of xswu/HPSv2" in capsys.readouterr().err
    assert run(["rewards", "fetch"]) == 2
    assert "Give the name of a reward, or --config RUN.yaml." in capsys.readouterr().err
