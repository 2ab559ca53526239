"""What a user installs: wheels, outside the repository, without the packages that only the workspace happens to have.

Each environment sees those third-party distributions that the metadata of the wheels in it ask for, and no others: what
is imported and not declared fails here, however often it is installed in the workspace.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from tests.support.fresh import METAPACKAGE, PLUGINS, ROOT, FreshEnvironment, metadata_of, needed_by

CORE = "alignprop-core"
OURS = [CORE, *PLUGINS]

REWARD = '''\
"""A reward of mine."""

from torch import Tensor

from alignprop_core import ImageBatch, Reward


class Greenness(Reward):
    """Green pictures."""

    def score(self, batch: ImageBatch) -> Tensor:
        return batch.images[:, 1].mean((1, 2))
'''
MODEL = """\
from alignprop_core.testing import tiny_pipeline
tiny_pipeline().save_pretrained("model")
"""
LOAD = """\
from importlib import import_module
from alignprop_core.registry.registry import default_registry
registry = default_registry()
for offer in registry.rewards():
    registry.reward_config_class(offer.full_name)
    module, _, name = offer.spec.factory.partition(":")
    getattr(import_module(module), name)
"""
"""Every reward's module and options class."""


def environment_of(
    names: list[str], folder: Path, wheel: Callable[[str], Path], *extra: str
) -> tuple[FreshEnvironment, set[str]]:
    """Make an environment with some of ours and what they require, ours included; return it and the names of ours."""
    known = {name: metadata_of(wheel(name)) for name in OURS}
    needed = needed_by(names, known)
    ours = {name for name in needed if name in known}
    environment = FreshEnvironment(folder, needed - ours)
    environment.install(*(wheel(name) for name in sorted(ours)))
    return environment, ours


def assert_consistent(environment: FreshEnvironment, cwd: Path) -> None:
    """`pip check` has nothing to say of ours; what third-party packages want of each other is theirs."""
    done = environment.run("pip check || true", cwd)
    assert [line for line in done.stdout.splitlines() if line.startswith("alignprop")] == []
    assert "No broken requirements" in done.stdout or " has requirement " in done.stdout, done.stderr


def installed(environment: FreshEnvironment, cwd: Path) -> dict[str, str]:
    """Return distribution -> status of the plugins; none has anything to remark."""
    plugins = json.loads(environment.run("alignprop plugins --json", cwd).stdout)["plugins"]
    assert [remark for plugin in plugins for remark in (plugin["error"], *plugin["warnings"]) if remark] == []
    return {plugin["distribution"]: plugin["status"] for plugin in plugins}


def test_the_core_alone_lists_checks_and_trains(tmp_path: Path, wheel: Callable[[str], Path]) -> None:
    environment, ours = environment_of([CORE], tmp_path / "environment", wheel)
    assert ours == {CORE}
    work = tmp_path / "work"
    work.mkdir()
    assert_consistent(environment, work)
    assert installed(environment, work) == {}
    assert "No plugins are installed" in environment.run("alignprop plugins", work).stdout
    assert json.loads(environment.run("alignprop rewards list --json", work).stdout) == []
    assert "No rewards are installed" in environment.run("alignprop rewards list", work).stdout
    assert json.loads(environment.run("alignprop schema", work).stdout)["title"]
    findings = json.loads(environment.run("alignprop doctor --json", work).stdout)
    assert [finding for finding in findings if finding["status"] == "error"] == []

    (work / "greenness.py").write_text(REWARD)
    (work / "prompts.txt").write_text("a cat\ntwo dogs\n")
    run = {
        "model": {"base": "./model"},
        "prompts": {"train": "./prompts.txt"},
        "sampling": {"steps": 2},
        "rewards": [{"name": "./greenness.py:Greenness"}],
        "training": {"steps": 2, "batch_size": 2, "device": "cpu"},
        "output": "run",
    }
    (work / "run.yaml").write_text(yaml.safe_dump(run))
    environment.run(["python", "-W", "error", "-c", MODEL], work)
    environment.run("alignprop train run.yaml", work)
    steps = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert all(step["grad_norm"] > 0 for step in steps)
    assert (work / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    # All of this was the wheel's.
    where = environment.run(["python", "-c", "import alignprop_core; print(alignprop_core.__file__)"], work).stdout
    assert Path(where.strip()).is_relative_to(environment.site)


@pytest.mark.timeout(600)  # a plugin's whole test suite is one test here
@pytest.mark.parametrize("plugin", PLUGINS)
@pytest.mark.parametrize("all_tests", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["contract", "all"])
def test_a_plugin_alone_passes_its_tests(
    plugin: str, all_tests: bool, tmp_path: Path, wheel: Callable[[str], Path]
) -> None:
    """With the core and those of ours that it requires.

    `make test` runs all quick tests of the plugin in the workspace. Alone, it imports them and runs those of the
    contract, which build each reward and score with it; `make test-all` repeats all of them.
    """
    environment, ours = environment_of([plugin], tmp_path / "environment", wheel)
    work = outside_the_repository(plugin, tmp_path / "outside")
    assert_consistent(environment, work)
    assert installed(environment, work) == dict.fromkeys(ours - {CORE, METAPACKAGE}, "loaded")
    # Before its tests' packages are there: rewards need nothing but what a user gets.
    environment.run(["python", "-W", "error", "-c", LOAD], work)

    known = {name: metadata_of(wheel(name)) for name in ours}
    tests = [f"{plugin}[dev]", "pytest", "pytest-timeout"]
    environment.show(needed_by(tests, known) - ours)
    words = ["pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--durations=5", "plugins"]
    if not all_tests:
        has_rewards = (work / "plugins" / plugin / "tests" / "test_conformance.py").is_file()
        words += ["-k", "test_conformance"] if has_rewards else ["--collect-only"]
    done = environment.run(words, work, timeout=580)
    print(done.stdout)
    assert re.search(r"^\d+(/\d+)? (passed|tests? collected)", done.stdout.splitlines()[-1]), done.stdout
    # What is skipped for want of a package wants another of ours, or an extra of ours that says so.
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    missing = [line for line in skipped if "not installed" in line or "could not import" in line]
    assert [line for line in missing if "alignprop" not in line.partition(": ")[2]] == []
    where = f"import importlib; print(importlib.import_module({plugin.replace('-', '_')!r}).__file__)"
    assert Path(environment.run(["python", "-c", where], work).stdout.strip()).is_relative_to(environment.site)


def outside_the_repository(plugin: str, folder: Path) -> Path:
    """Copy a plugin's folder without its source, and pytest's settings above it, as they stand in the repository."""
    ignored = shutil.ignore_patterns("src", "scripts", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "plugins" / plugin, folder / "plugins" / plugin, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    # The original hpsv2, third-party too, lies beside the environment: see the Makefile.
    (folder / "build").mkdir()
    (folder / "build" / "reference").symlink_to(ROOT / "build" / "reference")
    return folder


def test_all_plugins_live_together(tmp_path: Path, wheel: Callable[[str], Path]) -> None:
    environment, ours = environment_of(OURS, tmp_path / "environment", wheel)
    assert ours == set(OURS)
    work = tmp_path / "work"
    work.mkdir()
    assert_consistent(environment, work)
    assert installed(environment, work) == dict.fromkeys(set(PLUGINS) - {METAPACKAGE}, "loaded")
    rewards = json.loads(environment.run("alignprop rewards list --json", work).stdout)
    assert [reward["name"] for reward in rewards if reward["conflict"]] == []
    environment.run(["python", "-W", "error", "-c", LOAD], work)
    assert listing_seconds(environment, work) < 0.7

    config = {
        "model": {"base": "starter"},
        "prompts": {"train": "starter/simple_animals_number"},
        "sampling": {"steps": 2},
        "rewards": [
            {"name": "jpeg_compressibility", "weight": 0.5},
            {"name": "aesthetic", "options": {"weights": "starter"}},
            {"name": "hpsv2", "options": {"weights": "starter"}},
            {"name": "object_count", "options": {"weights": "starter", "detector": "rtdetr"}},
        ],
        "mix": {"combine": "balanced"},
        "training": {"steps": 2, "batch_size": 2, "device": "cpu"},
        "output": "run",
    }
    (work / "run.yaml").write_text(yaml.safe_dump(config))
    environment.run("alignprop train run.yaml --dry-run", work)
    assert not (work / "run").exists()


WORKER = """\
import sys
import torch
from alignprop_core.registry.registry import default_registry
from alignprop_core.reward import ImageBatch
from alignprop_isolation.config import IsolationConfig
from alignprop_isolation.lookup import IsolatedRewards

def scored(reward):
    images = torch.rand(3, 3, 16, 17, generator=torch.Generator().manual_seed(1)).requires_grad_()
    scores = reward(ImageBatch(images=images))
    return scores, torch.autograd.grad(scores.sum(), images)[0]

here = default_registry()
there = IsolatedRewards(IsolationConfig(python=sys.argv[1]), here)
assert there.reward("jpeg_compressibility").version == "0.1.0"
options = there.reward_options("jpeg_compressibility", {"quality": 80})
reward = there.load_reward("jpeg_compressibility", options)
assert all(map(torch.equal, scored(reward), scored(here.load_reward("jpeg_compressibility", options))))
reward.close()
"""
"""Scores in the environment with this interpreter, and in this one: they are equal."""

DESCRIBE = """\
import sys
from alignprop_isolation.describe import describe
describe("jpeg_compressibility", {})
print(*sys.modules)
"""


def test_an_isolated_reward_needs_no_heavy_package(tmp_path: Path, wheel: Callable[[str], Path]) -> None:
    """Beside core, worker and plugin, its environment has only what a worker, torch and the plugin require."""
    light = FreshEnvironment(
        tmp_path / "light", needed_by(["torch", "pydantic", "pluggy", "packaging", "safetensors", "pillow"], {})
    )
    heavy = {"diffusers", "transformers", "peft", "accelerate", "typer", "yaml", "rich", "huggingface_hub", "psutil"}
    assert not heavy & {link.name for link in (light.folder / "third-party").iterdir()}
    wheels = [str(wheel(name)) for name in (CORE, "alignprop-isolation", "alignprop-jpeg")]
    light.run(["pip", "install", "--no-deps", *wheels], tmp_path)
    full, _ = environment_of(["alignprop-isolation", "alignprop-jpeg"], tmp_path / "full", wheel)
    full.run(["python", "-W", "error", "-c", WORKER, str(light.bin / "python")], tmp_path)
    loaded = set(light.run(["python", "-I", "-c", DESCRIBE], tmp_path).stdout.split())
    assert not loaded & {"torch", "numpy"}


def listing_seconds(environment: FreshEnvironment, cwd: Path) -> float:
    """Return the processor time of `alignprop rewards list`, the best of four: wall time on a machine not busy."""
    seconds = []
    for _ in range(4):
        before = os.times()
        environment.run(["alignprop", "rewards", "list"], cwd)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return min(seconds)


ON_REQUEST = {"alignprop-starter", "alignprop-isolation"}
"""Users install these by name: one has large files, the other makes environments."""


def test_the_metapackage_requires_the_core_and_the_apache_licensed_plugins() -> None:
    projects = {name: project_of(name) for name in OURS}
    apache = {name for name, project in projects.items() if project["license"] == "Apache-2.0"}
    required = {Requirement(line).name for line in projects[METAPACKAGE]["dependencies"]}
    assert required == apache - ON_REQUEST - {METAPACKAGE}


def project_of(name: str) -> dict[str, Any]:
    """Return the `project` table of the core's or a plugin's pyproject.toml."""
    path = ROOT if name == CORE else ROOT / "plugins" / name
    project: dict[str, Any] = tomllib.loads((path / "pyproject.toml").read_text())["project"]
    return project


def test_the_plugins_versions_and_ranges_go_together() -> None:
    """Every plugin takes this core and these siblings: else one pip command cannot install them."""
    facts = {name: project_of(name) for name in OURS}
    for name, project in facts.items():
        extras = [line for lines in project.get("optional-dependencies", {}).values() for line in lines]
        for line in [*project["dependencies"], *extras]:
            wanted = Requirement(line)
            if wanted.name in facts:
                assert wanted.specifier.contains(facts[wanted.name]["version"]), f"{name} requires {line}"
                assert not wanted.specifier.contains("1.0"), f"{name}: {line} takes cores that it was not tested with"
