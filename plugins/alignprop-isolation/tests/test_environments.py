"""Creating environments for rewards."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from alignprop_core.cli import run
from alignprop_core.errors import OutputError, RunError
from alignprop_isolation.install import make_environment, python_of


def test_an_environment_does_not_overwrite_a_folder(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.txt").touch()
    with pytest.raises(OutputError, match="exists already and is not empty"):
        make_environment(tmp_path / "own", [])
    # pip is this environment's: installing another takes most of the time.
    (without_pip := tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@" --without-pip\n')
    without_pip.chmod(0o755)
    with pytest.raises(RunError, match=r"(?s)failed with exit code.*no-such-package"):
        make_environment(tmp_path / "new", [str(tmp_path / "no-such-package")], share=True, python=str(without_pip))


@pytest.mark.skipif(find_spec("alignprop_jpeg") is None, reason="alignprop-jpeg is not installed")
@pytest.mark.parametrize("made", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["linked", "made"])
def test_the_command_prints_an_entry_of_an_environment_that_answers(
    made: bool,
    isolated: tuple[Path, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Making one takes eight seconds: without `made` it is a link to the one that all tests use."""

    def link(folder: Path, distributions: list[str], *, share: bool, **_: object) -> None:
        assert (distributions, share) == (["alignprop-jpeg"], True)
        folder.parent.mkdir()
        folder.symlink_to(isolated[0] / "own")

    if not made:
        monkeypatch.setattr("alignprop_isolation.install.make_environment", link)
    monkeypatch.chdir(tmp_path)
    assert run(["rewards", "isolate", "jpeg_compressibility", "--share"]) == 0
    printed = capsys.readouterr().out
    assert "jpeg_compressibility of alignprop-jpeg" in printed
    (term,) = yaml.safe_load(printed[printed.index("rewards:") :])["rewards"]
    assert Path(term["isolation"]["python"]) == python_of(Path("isolated/jpeg_compressibility"))
    assert Path(term["isolation"]["python"]).exists()
    assert run(["rewards", "isolate", "jpeg_compresibility"]) == 2


def test_the_command_takes_a_class_in_a_file(isolated: tuple[Path, str]) -> None:
    folder, printed = isolated
    (term,) = yaml.safe_load(printed[printed.index("rewards:") :])["rewards"]
    assert term == {"name": "./mine.py:Mine", "isolation": {"python": str(python_of(Path("own")))}}
    # The packages of this environment are there, its own come first.
    code = "import alignprop_isolation, sys; print(sys.prefix)"
    prefix = subprocess.check_output([python_of(folder / "own"), "-I", "-c", code], text=True).strip()
    assert Path(prefix) == folder / "own"
