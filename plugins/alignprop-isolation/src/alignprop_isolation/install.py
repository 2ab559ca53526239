"""Creating an environment for a reward: the core without its heavy requirements, the plugin, its pins. No torch.

A plugin requires the core, and the core requires diffusers, transformers, peft and more, which scoring does not need.
So distributions of alignprop are installed without their requirements; the requirements of the worker and of the plugin
are installed separately.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from alignprop_core.errors import OutputError, RunError
from alignprop_core.registry.discovery import CORE

ISOLATION = "alignprop-isolation"
"""This distribution; worker and `describe` are part of it."""

WORKER_NEEDS = ("torch", "pydantic", "pluggy", "packaging", "safetensors")
"""Requirements of the core that a worker needs, in the versions that the core requires."""

_REQUIRES = """\
import json, sys
from importlib.metadata import PackageNotFoundError, requires
def of(name):
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return None
print(json.dumps({name: of(name) for name in sys.argv[1:]}))
"""


def python_of(folder: Path) -> Path:
    """Return the Python of a virtual environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def source_of(name: str) -> str:
    """Return what pip can install a distribution from again: the folder or file it came from, or `name==version`."""
    found = distribution(name)
    try:
        origin = json.loads(found.read_text("direct_url.json") or "{}")
    except ValueError:
        origin = {}
    url = urlparse(str(origin.get("url", "")))
    path = Path(url2pathname(url.path))
    if url.scheme == "file" and path.exists():
        return str(path)
    if origin.get("url") and url.scheme != "file":
        return str(origin["url"])
    return f"{name}=={found.version}"


def make_environment(
    folder: Path,
    plugins: Sequence[str],
    *,
    packages: Sequence[str] = (),
    share: bool = False,
    python: str = sys.executable,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Create a virtual environment for rewards and return its Python interpreter.

    Args:
        folder: the environment's folder; it must not exist, or be empty.
        plugins: distributions in any form that pip accepts: names, `name==version`, folders, wheels. They are installed
            with their requirements; the core and plugins (`alignprop-...`) among these are installed without theirs.
        packages: further requirements, such as conflicting pins.
        share: make the packages of the current environment available as well; the new environment's own packages take
            precedence, and what is available already is not installed again.
        python: the interpreter to create the environment with.
        say: called with each command before it runs.

    Raises:
        OutputError: the folder is in use.
        RunError: a command failed; the environment is kept for inspection.
    """
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{folder}: exists already and is not empty. Remove it, or choose another --into.")
    _run([python, "-m", "venv", str(folder)], say)
    inner = python_of(folder)
    pip = [str(inner), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if share:
        _see_this_environment(inner)
        ours = [plugin for plugin in plugins if not _is_here(plugin)]
    else:
        ours = [source_of(CORE), source_of(ISOLATION), *plugins]
    if ours:
        _run([*pip, "--no-deps", *ours], say)
    needed = _needs(inner, pip, say)
    rest = [*(needed if ours else ()), *packages]
    if rest:
        _run([*pip, *rest], say)
    return inner


def _see_this_environment(inner: Path) -> None:
    """Write a .pth file that appends this environment's packages to the path, after the new environment's own."""
    paths = json.loads(_output([str(inner), "-c", "import json, sysconfig; print(json.dumps(sysconfig.get_paths()))"]))
    here = sysconfig.get_paths()
    lines = [f"import site; site.addsitedir({here[key]!r})" for key in ("purelib", "platlib")]
    (Path(paths["purelib"]) / "this-environment-first.pth").write_text("\n".join(dict.fromkeys(lines)) + "\n")


def _is_here(plugin: str) -> bool:
    try:
        requirement = Requirement(plugin)
        return requirement.url is None and requirement.specifier.contains(
            distribution(requirement.name).version, prereleases=True
        )
    except (InvalidRequirement, PackageNotFoundError):
        return False


def _needs(inner: Path, pip: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """Install the plugins that installed plugins require, and return the third-party requirements of all of them."""
    wanted = [line for line in _required(inner, [CORE])[CORE] or () if _name(line) in WORKER_NEEDS]
    asked = {CORE, ISOLATION}  # of these two, only what a worker needs
    while True:
        names = json.loads(_output([str(inner), "-c", _NAMES]))
        fresh = [name for name in names if name not in asked]
        if not fresh:
            return list(dict.fromkeys(wanted))
        asked |= set(fresh)
        lines = [line for found in _required(inner, fresh).values() for line in found or ()]
        missing = [line for line in lines if _is_ours(line) and _name(line) not in names]
        wanted += [line for line in lines if not _is_ours(line)]
        if missing:
            _run([*pip, "--no-deps", *(_from_here(line) for line in missing)], say)


_NAMES = """\
import json
from importlib.metadata import distributions
found = {d.metadata["Name"].lower().replace("_", "-") for d in distributions()}
print(json.dumps(sorted(name for name in found if name.startswith("alignprop-"))))
"""


def _required(inner: Path, names: Sequence[str]) -> dict[str, list[str] | None]:
    found: dict[str, list[str] | None] = json.loads(_output([str(inner), "-c", _REQUIRES, *names]))
    kept: dict[str, list[str] | None] = {}
    for name, lines in found.items():
        applies = [line for line in lines or () if (m := Requirement(line).marker) is None or m.evaluate({"extra": ""})]
        kept[name] = applies
    return kept


def _name(line: str) -> str:
    return canonicalize_name(Requirement(line).name)


def _is_ours(line: str) -> bool:
    return _name(line).startswith("alignprop-")


def _from_here(line: str) -> str:
    """Return the source of a plugin that is installed here; otherwise the requirement itself."""
    try:
        return source_of(_name(line))
    except PackageNotFoundError:
        return line


def _run(command: Sequence[str], say: Callable[[str], None]) -> None:
    say(shlex.join(command))
    _output(command)


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = "\n".join(f"  {line}" for line in done.stderr.strip().splitlines()[-12:])
        raise RunError(f"{shlex.join(command)}\nfailed with exit code {done.returncode}:\n{last}")
    return done.stdout
