"""Installing from the package registry into environments with nothing in them: newest versions, and the lowest allowed.

Gigabytes are downloaded (pip keeps them), so all but the first test are slow. What `make test` can say without a
registry is in test_distributions.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.support.fresh import PLUGINS, ROOT, metadata_of, needed_by

PROJECTS = {"alignprop-core": ROOT, **{name: ROOT / "plugins" / name for name in PLUGINS}}
# What reads the workspace's files or makes environments of its own.
NOT_THESE = [
    "distributions",
    "fresh_installs",
    "new_reward",
    "environments",
    "isolated_hpsv2",
    "docs",
    "plugin_docs",
    "rooms",
]
NOT_THESE += ["example_plugins", "examples"]
# What thirty steps gain hangs on the tiny model's random weights, and those on the versions of torch and transformers.
NOT_THIS = "tests/training/test_mix_training.py::test_balanced_raises_both_where_sum_lets_the_large_one_win"


def requirements() -> Iterator[tuple[str, Requirement]]:
    """Yield each project's name with each third-party package that it or its tests require."""
    for name, folder in PROJECTS.items():
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        for line in [*project["dependencies"], *project.get("optional-dependencies", {}).get("dev", ())]:
            requirement = Requirement(line)
            if canonicalize_name(requirement.name) not in PROJECTS:
                yield name, requirement


def lowest() -> dict[str, Version]:
    """Return package -> its lowest allowed version."""
    bounds: dict[str, Version] = {}
    for project, requirement in requirements():
        found = [Version(s.version) for s in requirement.specifier if s.operator in (">=", "==")]
        assert found, f"{project} requires {requirement} and says no lowest version"
        name = canonicalize_name(requirement.name)
        assert bounds.setdefault(name, found[0]) == found[0], (
            f"{project} requires {requirement}, another {name}>={bounds[name]}: one of the two is never tried"
        )
    return bounds


def test_every_requirement_has_one_lowest_version() -> None:
    assert {"torch", "diffusers", "transformers", "peft"} <= lowest().keys()


def run(command: list[str], cwd: Path, *, timeout: int, **variables: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ALIGNPROP_", "PYTHON", "PYTEST_"))}
    environment = {**kept, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1", **variables}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-20000:]}\n{done.stderr[-5000:]}"
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that is gone afterwards: pytest keeps those of three runs, and these have gigabytes in them."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_lowest_allowed_versions_pass_the_tests(folder: Path, wheel: Callable[[str], Path]) -> None:
    """All requirements of the core and of the plugins at their lowest versions, what those require as pip finds it.

    Where this fails, raise the bound. `uv pip compile --resolution lowest-direct --no-build pyproject.toml
    plugins/*/pyproject.toml --extra dev` says which of the bounds can be had together.
    """
    pins = folder / "lowest.txt"
    pins.write_text("".join(f"{name}=={version}\n" for name, version in lowest().items()))
    venv.create(folder / "environment", with_pip=True)
    python = str(folder / "environment" / "bin" / "python")
    # Older pips look for an unpublished requirement only among what came before: what requires least comes first.
    ordered = sorted(PROJECTS, key=lambda name: len(needed_by([name], {n: metadata_of(wheel(n)) for n in PROJECTS})))
    ours = [f"{name}[dev] @ {wheel(name).as_uri()}" for name in ordered]
    run([python, "-m", "pip", "install", "--quiet", "--constraint", str(pins), *ours], folder, timeout=1800)
    run([python, "-m", "pip", "check"], folder, timeout=100)
    frozen = json.loads(run([python, "-m", "pip", "list", "--format", "json"], folder, timeout=100))
    versions = {canonicalize_name(line["name"]): Version(line["version"]) for line in frozen}
    assert {name: versions[name] for name in lowest()} == lowest()

    work = folder / "outside"
    work.mkdir()
    ignored = shutil.ignore_patterns("src", "__pycache__", "*.egg-info")
    for name in ("tests", "plugins", "examples"):
        shutil.copytree(ROOT / name, work / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", work)
    (work / "build").mkdir()
    (work / "build" / "reference").symlink_to(ROOT / "build" / "reference")
    words = [python, "-m", "pytest", "-q", "-m", "not slow", "-n", "logical", "--maxprocesses", "8"]
    words += ["--dist", "loadfile", "--no-loadscope-reorder", "-p", "no:cacheprovider"]
    # Releases of then warn of what has changed since, and diffusers < 0.40 wants a LoRA's file named when it is told
    # to be offline: so warnings are none of ours, and the hub is at an address where nobody answers.
    words += ["-o", "filterwarnings=default", *(f"--ignore-glob=*/test_{name}.py" for name in NOT_THESE)]
    words += ["--deselect", NOT_THIS]
    hub = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    printed = run([*words, "tests", "plugins"], work, timeout=1800, **hub)
    assert re.search(r"^\d{3,} passed", printed.splitlines()[-1]), printed


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_bare_checkout_sets_itself_up_and_trains(folder: Path) -> None:
    """What every `make` target does first, from the registry, in a copy without environment; then a run."""
    checkout = folder / "checkout"
    made = {"build", "site", "dist", "runs", "demo"}  # by `make` and by hand; and whatever starts with a dot

    def ignored(at: str, names: list[str]) -> set[str]:
        above = {n for n in names if n in made or n.startswith(".")} if Path(at) == ROOT else set()
        return above | {n for n in names if n == "__pycache__" or n.endswith(".egg-info")}

    shutil.copytree(ROOT, checkout, ignore=ignored)
    run(["make", ".venv/.installed", f"PYTHON={sys.executable}"], checkout, timeout=3000)
    tool = str(checkout / ".venv" / "bin" / "alignprop")
    run([str(checkout / ".venv" / "bin" / "python"), "-m", "pip", "check"], checkout, timeout=100)
    plugins = json.loads(run([tool, "plugins", "--json"], checkout, timeout=100))["plugins"]
    assert {plugin["distribution"]: plugin["status"] for plugin in plugins} == dict.fromkeys(PLUGINS, "loaded")
    short = ["training.steps=2", "training.batch_size=2", "sampling.steps=4", "training.device=cpu"]
    short += ["evaluation.images_per_prompt=1", f"output={folder / 'run'}"]
    run([tool, "train", "examples/mix.yaml", *short], checkout, timeout=300, HF_HUB_OFFLINE="1")
    assert (folder / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()
