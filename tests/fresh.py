"""Fresh environments outside the repository: ours from wheels, third-party packages from the environment of the tests.

A new virtual environment has a folder of links to this environment's packages, without anything of alignprop (editable
or not). So what is not installed there as a wheel is not there, entry points and data files included.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
_OURS = re.compile(r"(_*editable_*)?_*(impl_)?alignprop", re.IGNORECASE)
_PIP = """\
import sys
from pip._internal.cli.main import main
if sys.argv[1:2] == ["install"]:
    sys.argv[2:2] = ["--quiet", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
sys.exit(main())
"""


def build_wheel(project: Path, folder: Path) -> Path:
    """Build a project's wheel, offline, without touching the project."""
    before = set(folder.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", str(folder), str(project)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = set(folder.glob("*.whl")) - before
    return wheel


class FreshEnvironment:
    """A virtual environment with third-party packages and nothing of ours, and running commands in it."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False)
        self.folder = folder
        self.bin = folder / "bin"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.site = folder / "lib" / version / "site-packages"
        links = folder / "third-party"
        links.mkdir()
        for base in {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}:
            for entry in os.scandir(base):
                # .pth files of the other environment are what makes its editable installs appear.
                if not (_OURS.match(entry.name) or entry.name.endswith((".pth", "__pycache__"))):
                    (links / entry.name).symlink_to(entry.path)
        (self.site / "third-party.pth").write_text(f"{links}\n")
        self._script("pip", _PIP)
        self._script("pytest", "import sys\nimport pytest\nsys.exit(pytest.main())\n")

    def _script(self, name: str, code: str) -> None:
        (self.bin / name).write_text(f"#!{self.bin / 'python'}\n{code}")
        (self.bin / name).chmod(0o755)

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables of a shell in which this environment is active."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("ALIGNPROP_", "PYTHON", "PYTEST_"))}
        return {
            **kept,
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "VIRTUAL_ENV": str(self.folder),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "NO_COLOR": "1",
        }

    def run(
        self, command: str | Iterable[str], cwd: Path, *, code: int = 0, timeout: int = 200
    ) -> subprocess.CompletedProcess[str]:
        """Run a command line (in bash) or a list of words; what it prints is in the failure, if it does not exit so."""
        words = ["bash", "-euo", "pipefail", "-c", command] if isinstance(command, str) else list(command)
        done = subprocess.run(
            words, cwd=cwd, env=self.variables, capture_output=True, text=True, timeout=timeout, check=False
        )
        assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def install(self, *wheels: Path) -> None:
        """Install wheels, dependencies looked for among what is there."""
        self.run(["pip", "install", *map(str, wheels)], self.folder)
