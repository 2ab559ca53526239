"""What happens when a worker crashes, is too slow or too large, or when the run ends."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
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
    load: Load,
    load_once: Load,
    images: Images,
    scored: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    reward = load("Redness", {"does": "crash once", "folder": str(tmp_path)})
    before = reward.worker
    with caplog.at_level(logging.WARNING):
        scores = scored(reward, images())
    assert all(map(torch.equal, scores, scored(load_once("Redness"), images())))
    assert "exit code 7" in caplog.text
    assert "my last output" in caplog.text
    assert reward.worker not in (None, before)


def test_errors_keep_their_type_and_message(load: Load, images: Images) -> None:
    with pytest.raises(RewardError, match=r"raised ValueError: three is one too many \(in its own env") as caught:
        load("Redness", {"does": "raise"})(ImageBatch(images=images()))
    assert "elsewhere.py" in "".join(caught.value.__notes__)
    with pytest.raises(RewardError, match=r"could not be built: OSError: no such weights"):
        load("Unbuilt")


def test_a_reward_that_takes_too_long_is_terminated(load: Load, images: Images) -> None:
    reward = load("Redness", {"does": "sleep"}, timeout=1.0)
    process = psutil.Process(reward.worker)
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"did not score a batch within 1 s.*isolation\.timeout"):
        reward(ImageBatch(images=images()))
    assert time.monotonic() - start < 15
    assert not process.is_running()


def test_a_reward_that_uses_too_much_memory_is_terminated(load: Load, images: Images) -> None:
    reward = load("Redness", {"does": "grow"}, memory_limit=2.0)
    process = psutil.Process(reward.worker)
    with pytest.raises(RewardError, match=r"GiB of memory to score a batch, more than isolation\.memory_limit of 2"):
        reward(ImageBatch(images=images()))
    assert not process.is_running()


def test_a_worker_that_crashes_twice_fails_the_run_by_its_name_and_keeps_what_was_saved(
    python: Path, file: Path, config_file: Config, train: Callable[..., Path], tmp_path: Path
) -> None:
    """The run trains on a reward of its own process, so the workers that it leaves behind would be of this one."""
    pytest.importorskip("alignprop_evaluation", reason="alignprop-evaluation is not installed")
    (tmp_path / "here.py").write_text("def brightness(images, prompts):\n    return images.mean((1, 2, 3))\n")
    isolation = {"python": str(python)}
    term = {
        "name": f"{file}:Redness",
        "label": "brittle",
        "options": {"does": "crash in batches"},
        "isolation": isolation,
    }
    path = config_file({"name": "./here.py:brightness"}, evaluation={"rewards": [term], "every": 1})
    before = workers()
    failure = r'(?s)Reward "brittle": its worker exited.*exit code 7.*my last output.*second time'
    with pytest.raises(RewardError, match=failure):
        train(path)
    assert workers() == before
    assert (tmp_path / "run" / "config.yaml").exists()


def workers() -> set[int]:
    """Return the process ids of this process's workers that are running or were not waited for."""
    return {process.pid for process in psutil.Process().children()}


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


RUNS = """\
import os
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import alignprop_isolation.reward
config, folder, *names = sys.argv[1:]
alignprop_isolation.reward.shared_folder = lambda: f"{folder}/shared-{name}"
import alignprop_core.training.trainer
from alignprop_core.cli import main
from alignprop_core.config.load import load_config
load_config(config)
for name in names:
    if os.fork() == 0:
        os.setsid()
        printed = os.open(f"{folder}/printed-{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        sys.argv = ["alignprop", "train", config, f"output={folder}/run-{name}"]
        with open(f"{folder}/pid-{name}", "w") as file:
            file.write(str(os.getpid()))
        main()
for name in names:
    os.wait()
"""
"""Runs that listen to Ctrl-C even if a shell that runs the tests in the background ignores it.

Each is a process of its own in a group of its own, as in a terminal. They share the imports and the descriptions of the
reward, which take half a minute.
"""


SCORES = """\
import os
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import torch
import alignprop_isolation.reward
from alignprop_core.config.yaml import read_yaml
from alignprop_core.reward import ImageBatch
config, folder, *names = sys.argv[1:]
alignprop_isolation.reward.shared_folder = lambda: f"{folder}/shared-{name}"
from alignprop_core.registry.registry import Registry
from alignprop_isolation.config import IsolationConfig
from alignprop_isolation.lookup import IsolatedRewards
(entry,) = read_yaml(open(config).read(), config)[0]["rewards"]
rewards = IsolatedRewards(IsolationConfig(**entry["isolation"]), Registry([]))
for name in names:
    if os.fork() == 0:
        os.setsid()
        os.dup2(os.open(f"{folder}/printed-{name}", os.O_WRONLY | os.O_CREAT), 2)
        with open(f"{folder}/pid-{name}", "w") as file:
            file.write(str(os.getpid()))
        reward = rewards.load_reward(entry["name"], entry["options"])
        try:
            reward(ImageBatch(images=torch.rand(1, 3, 8, 8)))
        except KeyboardInterrupt:
            sys.exit(130)
for name in names:
    os.wait()
"""
"""As `RUNS`, but each process only scores with the reward, without a model: a fraction of the imports."""


@pytest.mark.parametrize("program", [SCORES, pytest.param(RUNS, marks=pytest.mark.slow)], ids=["process", "run"])
def test_a_run_that_ends_ends_its_worker(
    program: str, python: Path, file: Path, config_file: Config, tmp_path: Path
) -> None:
    """Ctrl-C reaches the whole process group; the other run is killed; both while the worker is busy."""
    options = {"does": "sleep", "folder": str(tmp_path / "marks")}
    path = config_file({"name": f"{file}:Redness", "isolation": {"python": str(python)}, "options": options})
    names = ("interrupted", "killed")
    for folder in ("marks", *(f"shared-{name}" for name in names)):
        (tmp_path / folder).mkdir()
    both = subprocess.Popen(
        [sys.executable, "-c", program, str(path), str(tmp_path), *names], stderr=subprocess.PIPE, text=True
    )

    def printed(name: str) -> str:
        return (tmp_path / f"printed-{name}").read_text()

    busy = tmp_path / "marks"
    wait_for(lambda: len(list(busy.iterdir())) == 2 or both.poll() is not None, 200)
    assert both.poll() is None, f"{both.communicate()[1]}\n{printed(names[0])}"
    for name in names:
        run = psutil.Process(int((tmp_path / f"pid-{name}").read_text()))
        (worker,) = run.children()
        shared = tmp_path / f"shared-{name}"
        assert len(list(shared.iterdir())) == 1
        if name == "interrupted":
            os.killpg(run.pid, signal.SIGINT)
        else:
            run.kill()
        wait_for(partial(ended, run), 30)
        wait_for(partial(ended, worker), 15)
        wait_for(partial(is_empty, shared), 15)
    assert "Traceback" not in printed("interrupted")
    both.communicate(timeout=30)


def ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def is_empty(folder: Path) -> bool:
    return not list(folder.iterdir())


def wait_for(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
