"""What happens when a worker crashes, is too slow or too large, or when the run ends."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from alignprop_core.errors import RewardError
from alignprop_core.reward import ImageBatch
from alignprop_isolation.lookup import IsolatedRewards
from alignprop_isolation.reward import IsolatedReward

Load = Callable[..., Any]
Images = Callable[..., Tensor]
Config = Callable[..., Path]


def test_a_worker_that_crashes_is_restarted_once(
    load: Load, images: Images, scored: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reward = load("CrashesOnce", {"mark": str(tmp_path / "mark")})
    before = reward.worker
    with caplog.at_level(logging.WARNING):
        scores = scored(reward, images())
    assert all(map(torch.equal, scores, scored(load("Redness"), images())))
    assert "exit code 7" in caplog.text
    assert "my last output" in caplog.text
    assert reward.worker not in (None, before)


def test_a_worker_that_crashes_twice_is_an_error(load: Load, images: Images) -> None:
    reward = load("Crashes")
    with pytest.raises(RewardError, match=r"(?s)exit code 7.*my last output.*second time"):
        reward(ImageBatch(images=images()))
    assert reward.worker is None


def test_errors_keep_their_type_and_message(load: Load, images: Images) -> None:
    with pytest.raises(RewardError, match=r"raised ValueError: three is one too many \(in its own env") as caught:
        load("Raises")(ImageBatch(images=images()))
    assert "elsewhere.py" in "".join(caught.value.__notes__)
    with pytest.raises(RewardError, match=r"could not be built: OSError: no such weights"):
        load("Unbuilt")


def test_a_reward_that_takes_too_long_is_terminated(load: Load, images: Images) -> None:
    reward = load("Sleeps", timeout=1.0)
    process = psutil.Process(reward.worker)
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"did not score a batch within 1 s.*isolation\.timeout"):
        reward(ImageBatch(images=images()))
    assert time.monotonic() - start < 15
    assert not process.is_running()


def test_a_reward_that_uses_too_much_memory_is_terminated(load: Load, images: Images) -> None:
    reward = load("Grows", memory_limit=2.0)
    process = psutil.Process(reward.worker)
    with pytest.raises(RewardError, match=r"GiB of memory to score a batch, more than isolation\.memory_limit of 2"):
        reward(ImageBatch(images=images()))
    assert not process.is_running()


def test_a_failing_worker_fails_the_run_by_its_name_and_keeps_what_was_saved(
    python: Path, file: Path, config_file: Config, train: Callable[..., Path], tmp_path: Path
) -> None:
    isolation = {"python": str(python)}
    term = {"name": f"{file}:Crashes", "label": "brittle", "isolation": isolation}
    trained = {"name": f"{file}:Redness", "isolation": isolation}
    path = config_file(trained, evaluation={"rewards": [term], "every": 1})
    with pytest.raises(RewardError, match=r'(?s)Reward "brittle": its worker exited.*my last output'):
        train(path)
    assert (tmp_path / "run" / "config.yaml").exists()


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder for the shared files of one test: processes of other tests share the machine's own folder."""
    folder = tmp_path / "shared"
    folder.mkdir()
    return folder


def test_nothing_is_left_when_the_reward_is_collected(
    python: Path,
    file: Path,
    rewards_of: Callable[..., IsolatedRewards],
    shared: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("alignprop_isolation.reward.shared_folder", lambda: str(shared))
    reward = rewards_of(python).load_reward(f"{file}:Redness")
    assert isinstance(reward, IsolatedReward)
    assert len(list(shared.iterdir())) == 1
    process = psutil.Process(reward.worker)
    del reward
    assert not process.is_running()
    assert not list(shared.iterdir())


RUN = """\
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import alignprop_isolation.reward
folder = sys.argv.pop(1)
alignprop_isolation.reward.shared_folder = lambda: folder
from alignprop_core.cli import main
main()
"""
"""A run that listens to Ctrl-C even if a shell that runs the tests in the background ignores it."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "killed"])
def test_a_run_that_ends_ends_its_worker(
    python: Path, file: Path, config_file: Config, tmp_path: Path, shared: Path, number: signal.Signals
) -> None:
    """Ctrl-C reaches the whole process group, as in a terminal; both while the worker is busy."""
    mark = tmp_path / "busy"
    path = config_file({"name": f"{file}:Sleeps", "isolation": {"python": str(python)}, "options": {"mark": str(mark)}})
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, str(shared), "train", str(path)],
        start_new_session=True, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: mark.exists() or run.poll() is not None, 200)
    assert run.poll() is None, run.communicate()[1]
    (worker,) = psutil.Process(run.pid).children()
    assert len(list(shared.iterdir())) == 1
    if number == signal.SIGINT:
        os.killpg(run.pid, number)
    else:
        run.kill()
    _, printed = run.communicate(timeout=30)
    wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, 15)
    wait_for(lambda: not list(shared.iterdir()), 15)
    if number == signal.SIGINT:
        assert "Traceback" not in printed


def wait_for(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
