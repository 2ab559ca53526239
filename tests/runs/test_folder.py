"""The run folder: atomic writes, one writer, clear messages."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from alignprop_core._files import safe_name
from alignprop_core.errors import OutputError
from alignprop_core.runs.folder import FILES, FOLDERS, RunFolder
from alignprop_core.runs.lock import LOCK_NAMES

posix = pytest.mark.skipif(os.name != "posix", reason="uses POSIX signals and limits")


def made(path: Path) -> RunFolder:
    run = RunFolder.create(path)
    run.write_text("config.yaml", "version: 1\n")
    return run


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A real second process, in which `run(path)` and `lock(path)` are at hand."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def killed_when_it_says_so(code: str, *arguments: object) -> None:
    with child(code, *arguments) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line == "now\n", process.stderr.read() if process.stderr else line
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


def left(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.name not in LOCK_NAMES)


# --- making and opening ----------------------------------------------------------------------------------------------


def test_a_new_folder_has_the_agreed_names(tmp_path: Path) -> None:
    with made(tmp_path / "runs" / "first") as run:
        assert FILES == ("config.yaml", "environment.json", "metrics.jsonl", "evaluation.json", "report.html")
        assert FOLDERS == ("lora", "checkpoints", "images")
        assert run.lora == tmp_path / "runs" / "first" / "lora"
        run.append_metrics({"step": 1})
    assert left(run.path) == ["config.yaml", "metrics.jsonl"]
    assert not (run.path / ".lock.pid").exists()


def test_a_folder_that_is_not_empty_is_refused_and_left_unchanged(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"contains notes\.txt.*another output, .*--resume latest") as caught:
        RunFolder.create(tmp_path)
    assert caught.value.exit_code == 2
    with pytest.raises(OutputError, match="other than a run and is not overwritten"):
        RunFolder.create(tmp_path, overwrite=True)
    with pytest.raises(OutputError, match="is a file"):
        RunFolder.create(tmp_path / "notes.txt")
    with pytest.raises(OutputError, match=r"notes\.txt is a file"):
        RunFolder.create(tmp_path / "notes.txt" / "below")
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "notes.txt" / "below"):
        with pytest.raises(OutputError):
            RunFolder.check_free(path)
    RunFolder.check_free(tmp_path / "new" / "run")
    with pytest.raises(OutputError, match="not a run folder"):
        RunFolder.open(tmp_path)
    assert left(tmp_path) == ["notes.txt"]


def test_overwrite_removes_only_files_of_a_run(tmp_path: Path) -> None:
    with made(tmp_path) as run:
        run.write_text("lora/x.safetensors", "x")
        run.append_metrics({"step": 1})
    (tmp_path / "notes.txt").write_text("mine")
    with RunFolder.create(tmp_path, overwrite=True):
        assert left(tmp_path) == ["notes.txt"]


def test_only_one_part_of_a_process_may_write(tmp_path: Path) -> None:
    run = made(tmp_path)
    with pytest.raises(OutputError, match=rf"in use by another run \(process {os.getpid()} \(this one\)\)"):
        RunFolder.open(tmp_path)
    RunFolder.open(tmp_path, lock=False).close()
    run.close()
    run.close()
    with RunFolder.open(tmp_path):
        pass


HOLD = """
import sys, time
from alignprop_core.runs.folder import RunFolder
run = RunFolder.open(sys.argv[1])
print("now", flush=True)
time.sleep(60)
"""


@posix
def test_another_process_is_refused_and_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    made(tmp_path).close()
    with child(HOLD, tmp_path) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "now\n"
        with pytest.raises(OutputError, match=rf"in use by another run \(process {holder.pid}\)"):
            RunFolder.open(tmp_path)
        RunFolder.open(tmp_path, lock=False).close()
        holder.kill()
        holder.wait()
    assert (tmp_path / ".lock.pid").read_text() == f"{holder.pid}\n"
    (tmp_path / ".config.yaml.999.tmp").write_text("half")
    with RunFolder.open(tmp_path):
        assert (tmp_path / ".lock.pid").read_text() == f"{os.getpid()}\n"
        assert left(tmp_path) == ["config.yaml"], "what the dead process was writing is cleared"


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "lora/../../x", ".", "away/x"])
def test_nothing_is_written_outside(name: str, tmp_path: Path) -> None:
    with made(tmp_path / "run") as run:
        (run.path / "away").symlink_to(tmp_path)
        with pytest.raises(OutputError, match="outside the run folder"):
            run.write_text(name, "x")
        with pytest.raises(OutputError, match="outside the run folder"):
            run.keep_newest("../*", 1)
    assert not (tmp_path / "x").exists()


def test_safe_names() -> None:
    assert safe_name("a cat / on a mat?") == "a_cat_on_a_mat"
    assert safe_name("../../etc/passwd") == "etc_passwd"
    assert safe_name("..") == safe_name("狐") == "unnamed"
    assert len(safe_name("x" * 500)) == 80


# --- atomic writes ---------------------------------------------------------------------------------------------------

KILLED_IN_WRITE = """
import os, sys, time
from alignprop_core.runs.folder import RunFolder
run = RunFolder.open(sys.argv[1])
def stop(descriptor):
    print("now", flush=True)
    time.sleep(60)
os.fsync = stop
run.write_text("evaluation.json", "new" * 1_000_000)
"""

KILLED_IN_STAGED = """
import sys, time
from alignprop_core.runs.folder import RunFolder
run = RunFolder.open(sys.argv[1])
with run.staged("checkpoints/step-2") as folder:
    (folder / "state").write_text("half")
    print("now", flush=True)
    time.sleep(60)
"""


@posix
def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file(tmp_path: Path) -> None:
    with made(tmp_path) as run:
        run.write_text("evaluation.json", "old")
    killed_when_it_says_so(KILLED_IN_WRITE, tmp_path)
    assert (run.path / "evaluation.json").read_text() == "old"
    assert any(p.suffix == ".tmp" for p in tmp_path.iterdir()), "it was really in the middle"
    with RunFolder.open(tmp_path):
        assert left(tmp_path) == ["config.yaml", "evaluation.json"]


@posix
def test_a_kill_while_a_checkpoint_is_filled_leaves_no_checkpoint_of_that_name(tmp_path: Path) -> None:
    with made(tmp_path) as run, run.staged("checkpoints/step-1") as folder:
        (folder / "state").write_text("whole")
    killed_when_it_says_so(KILLED_IN_STAGED, tmp_path)
    assert [p.name for p in (run.path / "checkpoints").glob("step-*")] == ["step-1"]
    with RunFolder.open(tmp_path):
        assert left(run.path / "checkpoints") == ["step-1", "step-1/state"]


def test_staged_replaces_atomically_and_an_error_keeps_the_old(tmp_path: Path) -> None:
    with made(tmp_path) as run:
        for text in ("one", "two"):
            with run.staged("checkpoints/a") as folder:
                (folder / "state").write_text(text)
        with pytest.raises(FileNotFoundError), run.staged("checkpoints/a") as folder:
            (folder / "state").rename(folder / "no" / "such" / "place")
        assert left(run.path / "checkpoints") == ["a", "a/state"]
        assert (run.path / "checkpoints" / "a" / "state").read_text() == "two"


FULL = """
import resource, sys
from safetensors.numpy import save_file
import numpy
from alignprop_core.errors import OutputError
from alignprop_core.runs.folder import RunFolder
run = RunFolder.open(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
def step(number):
    run.append_metrics({"step": number, "text": "x" * 900})
def staged():
    with run.staged("checkpoints/b") as folder:
        save_file({"a": numpy.zeros(9000)}, folder / "state.safetensors")
actions = [lambda: run.write_text("evaluation.json", "x" * 9000), staged, *(lambda n=n: step(n) for n in range(5))]
for action in actions:
    try:
        action()
        print("done")
    except OutputError as error:
        print(error)
"""


@posix
def test_a_full_disk_gives_one_clear_message_and_keeps_what_was_saved(tmp_path: Path) -> None:
    with made(tmp_path) as run:
        run.write_text("evaluation.json", "old")
        with run.staged("checkpoints/a") as folder:
            (folder / "state").write_text("whole")
    with child(FULL, tmp_path) as process:
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    lines = output.splitlines()
    assert [line for line in lines if line == "done"] == ["done"] * 4, output  # four metrics lines fit
    refused = [line for line in lines if line != "done"]
    assert [line.split(": ")[0] for line in refused] == [
        f"Not enough disk space for {run.path / 'evaluation.json'}",
        f"Not enough disk space for {run.path / 'checkpoints' / 'b'}",
        f"Not enough disk space for {run.path / 'metrics.jsonl'}",
    ]
    assert all("Files saved earlier are complete" in line and "--resume latest" in line for line in refused)
    assert (run.path / "evaluation.json").read_text() == "old"
    assert [row["step"] for row in run.read_metrics()] == [0, 1, 2, 3]
    assert (run.path / "metrics.jsonl").read_bytes().endswith(b"\n")
    assert left(tmp_path) == [
        *("checkpoints", "checkpoints/a", "checkpoints/a/state", "config.yaml", "evaluation.json", "metrics.jsonl")
    ]


def test_too_little_space_is_reported_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    with made(tmp_path) as run:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
        with pytest.raises(OutputError, match=r"2\.0 kB needed, 1\.0 kB free"):
            run.write_text("evaluation.json", "x" * 2000)
        with pytest.raises(OutputError, match=r"5\.0 MB needed"), run.staged("checkpoints/a", needs=5_000_000):
            pytest.fail("the block must not run")
        # torch.save speaks of positions, not of space, when the disk is full
        with pytest.raises(OutputError, match="Not enough disk space"), run.staged("checkpoints/a"):
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    assert left(tmp_path) == ["checkpoints", "config.yaml"]


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to_is_reported(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        RunFolder.create(tmp_path / "run")
    tmp_path.chmod(0o700)


# --- metrics and rotation --------------------------------------------------------------------------------------------


def test_metrics_are_readable_at_once_and_valid_json(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    with made(tmp_path) as run:
        assert run.read_metrics() == []
        run.append_metrics({"step": 1, "reward": torch.tensor(0.5), "terms": {"a": math.nan}, "kept": (1, 2)})
        assert RunFolder.open(tmp_path, lock=False).read_metrics() == [
            {"step": 1, "reward": 0.5, "terms": {"a": None}, "kept": [1, 2]}
        ]
        run.append_metrics({"step": 2})
        assert len((run.path / "metrics.jsonl").read_text().splitlines()) == 2
        run.write_json("evaluation.json", {"mean": math.inf, "狐": Path("x")})
        assert json.loads((run.path / "evaluation.json").read_text("utf-8")) == {"mean": None, "狐": "x"}


def test_an_incomplete_line_is_ignored_and_removed_on_resume(tmp_path: Path) -> None:
    with made(tmp_path) as run:
        for step in range(1, 6):
            run.append_metrics({"step": step})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "rew')
    with RunFolder.open(tmp_path) as run:
        assert [row["step"] for row in run.read_metrics()] == [1, 2, 3, 4, 5]
        run.append_metrics({"step": 6})
        assert [row["step"] for row in run.read_metrics()] == [1, 2, 3, 4, 5, 6]
        run.truncate_metrics(3)
        run.append_metrics({"step": 4})
        assert [row["step"] for row in run.read_metrics()] == [1, 2, 3, 4]
        (run.path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
        with pytest.raises(OutputError, match="line 2"):
            run.read_metrics()


def test_the_newest_are_kept_by_number(tmp_path: Path) -> None:
    with made(tmp_path) as run:
        for step in (9, 10, 100):
            run.write_text(f"lora/fox-{step}.safetensors", "x")
            with run.staged(f"checkpoints/step-{step}") as folder:
                (folder / "state").write_text("x")
        run.write_text("lora/fox.safetensors", "x")
        assert [p.name for p in run.keep_newest("lora/fox-*.safetensors", 2)] == ["fox-9.safetensors"]
        assert [p.name for p in run.keep_newest("checkpoints/step-*", 1)] == ["step-9", "step-10"]
        assert left(run.lora) == ["fox-10.safetensors", "fox-100.safetensors", "fox.safetensors"]
        assert left(run.path / "checkpoints") == ["step-100", "step-100/state"]
        assert run.keep_newest("checkpoints/step-*", 5) == []
        with pytest.raises(OutputError, match=r"save\.keep"):
            run.keep_newest("checkpoints/step-*", 0)


def test_importing_the_module_imports_no_torch() -> None:
    code = "import sys, alignprop_core.runs.folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
