"""Fresh environments outside the repository: ours from wheels, third-party packages from the environment of the tests.

A new virtual environment has a folder of links to this environment's packages, without anything of alignprop (editable
or not). So what is not installed there as a wheel is not there, entry points and data files included. It may also have
links to only what some requirements ask for, so that a package that is used and not declared is not there either.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, PathDistribution, distribution
from pathlib import Path

from filelock import FileLock
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PLUGINS = sorted(path.name for path in (ROOT / "plugins").iterdir() if (path / "pyproject.toml").is_file())
METAPACKAGE = "alignprop"
"""Among them, but not a plugin: it only requires others and has no entry point."""

_OURS = re.compile(r"(_*editable_*)?_*(impl_)?alignprop", re.IGNORECASE)
_BUILD = """\
import sys
from importlib import import_module
import_module(sys.argv[1]).build_wheel(sys.argv[2])
"""
_PIP = """\
import sys
from pip._internal.cli.main import main
if sys.argv[1:2] == ["install"]:
    sys.argv[2:2] = ["--quiet", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
sys.exit(main())
"""
_INSTALL = """\
import sys
from pip._internal.cli.main import main
check, *wheels = sys.argv[1:]
failed = main(["install", "--quiet", "--no-index", "--no-deps", "--disable-pip-version-check", *wheels])
if failed:
    sys.exit(failed)
if check:
    main(["check"])
"""


def build_wheel(project: Path, folder: Path) -> Path:
    """Build a project's wheel, offline, without touching the project: with its backend's hook, as pip would call it."""
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.glob("*.whl"))
    backend = tomllib.loads((project / "pyproject.toml").read_text())["build-system"]["build-backend"]
    command = [sys.executable, "-P", "-c", _BUILD, backend, str(folder.absolute())]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = set(folder.glob("*.whl")) - before
    return wheel


def shared_wheel(name: str, folder: Path) -> Path:
    """Return the wheel of the core or of a plugin in `folder`; the first of all processes that asks builds it."""
    own = folder / name
    own.mkdir(parents=True, exist_ok=True)
    with FileLock(own / "lock"):
        built = list(own.glob("*.whl"))
        return built[0] if built else build_wheel(ROOT if name == "alignprop-core" else ROOT / "plugins" / name, own)


def metadata_of(wheel: Path) -> Distribution:
    """Return what a wheel says of itself, read from the wheel."""
    name, version, *_ = wheel.name.split("-")
    return PathDistribution(zipfile.Path(wheel, f"{name}-{version}.dist-info/"))


def needed_by(requirements: Iterable[str], known: Mapping[str, Distribution]) -> set[str]:
    """Return the normalized names of all distributions that requirements ask for, directly or through others.

    Markers are those of this interpreter. `known` has distributions by name that are looked at first; the others are
    looked for in this environment.
    """
    waiting = [Requirement(line) for line in requirements]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                further = _requirements(known[name]) if name in known else _required_here(name)
            except PackageNotFoundError:
                raise AssertionError(f"{requirement} is required, and is not in the environment of the tests") from None
            waiting += [r for r in further if r.marker is None or r.marker.evaluate({"extra": extra})]
    return {name for name, _ in seen}


def _requirements(found: Distribution) -> list[Requirement]:
    return [Requirement(line) for line in found.requires or ()]


@cache
def _required_here(name: str) -> list[Requirement]:
    return _requirements(distribution(name))


@cache
def _top_level(name: str) -> list[Path]:
    """Return the files and folders of a distribution of this environment that lie directly in site-packages."""
    found = distribution(name)
    tops = {file.parts[0] for file in found.files or ()} - {"..", "/"}
    assert tops, f"{name} does not say which files are its own"
    return [Path(str(found.locate_file(top))) for top in sorted(tops)]


class FreshEnvironment:
    """A virtual environment with third-party packages and nothing of ours, and running commands in it.

    Args:
        folder: where it is made.
        third_party: names of the distributions it sees; None for all of this environment.
    """

    def __init__(self, folder: Path, third_party: Iterable[str] | None = None) -> None:
        venv.create(folder, with_pip=False)
        self.folder = folder
        self.bin = folder / "bin"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.site = folder / "lib" / version / "site-packages"
        self.third_party: set[str] = set()
        self._links = folder / "third-party"
        self._links.mkdir()
        (self.site / "third-party.pth").write_text(f"{self._links}\n")
        if third_party is None:
            for base in {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}:
                for entry in os.scandir(base):
                    self._link(Path(entry.path))
        else:
            self.show({"pip", *third_party})
        self._script("pip", _PIP)
        self._script("pytest", "import sys\nimport pytest\nsys.exit(pytest.main())\n")

    def show(self, third_party: set[str]) -> None:
        """Let it see further distributions of this environment."""
        self.third_party |= third_party
        for name in third_party:
            for path in _top_level(name):
                self._link(path)

    def _link(self, path: Path) -> None:
        # .pth files of the other environment are what makes its editable installs appear.
        if not (_OURS.match(path.name) or path.name.endswith((".pth", "__pycache__"))):
            link = self._links / path.name
            if not link.is_symlink():
                link.symlink_to(path)

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

    def install(self, *wheels: Path, check: bool = True) -> None:
        """Install wheels; `pip check` says what they require and do not find. What others want of each other is theirs.

        One process does both, and pip looks for no dependencies: that takes it four times as long as the rest. The
        check takes twice as long as installing, so it is for environments whose requirements no other test checks.
        """
        done = self.run(["python", "-c", _INSTALL, "check" if check else "", *map(str, wheels)], self.folder)
        if check:
            assert [line for line in done.stdout.splitlines() if line.startswith("alignprop")] == [], done.stdout
            assert "No broken requirements" in done.stdout or " has requirement " in done.stdout, done.stderr
