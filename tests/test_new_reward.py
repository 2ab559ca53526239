"""`alignprop rewards new` creates working plugins: built, installed outside the repository, tested and trained on."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from alignprop_core import __version__, cli
from alignprop_template.scaffold import LICENSES, render, reward_project
from tests.support.fresh import FreshEnvironment, build_wheel

QUICK = {"warm_colors": (False, False, "Apache-2.0"), "dark_colors": (True, True, "MIT")}
"""Every block of the templates once out and once in; the others are in `make test-all`."""
COMBINATIONS = [{"warm_colors": c} for c in product((False, True), (False, True), LICENSES) if c not in QUICK.values()]


@pytest.fixture
def wheels(wheel: Callable[[str], Path]) -> list[Path]:
    return [wheel("alignprop-core"), wheel("alignprop-template")]


@pytest.mark.parametrize("made", [QUICK, *(pytest.param(one, marks=pytest.mark.slow) for one in COMBINATIONS)], ids=str)
def test_new_plugins_build_install_and_pass_their_tests(
    made: dict[str, tuple[bool, bool, str]], wheels: list[Path], tmp_path: Path
) -> None:
    environment = FreshEnvironment(tmp_path / "environment")
    environment.install(*wheels, check=False)
    projects = {name: tmp_path / f"alignprop-{name.replace('_', '-')}" for name in made}
    for name, (prompts, weights, license) in made.items():
        flags = ["--prompts" if prompts else "--no-prompts", "--weights" if weights else "--no-weights"]
        environment.run(["alignprop", "rewards", "new", name, *flags, "--license", license], tmp_path)
        for command in ("check", "format --check"):
            words = [sys.executable, "-m", "ruff", *command.split(), "."]
            done = subprocess.run(words, cwd=projects[name], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout
    environment.install(*(build_wheel(project, tmp_path / "dist") for project in projects.values()))
    folders = list(map(str, projects.values()))
    done = environment.run(["pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", *folders], tmp_path)
    assert " passed" in done.stdout
    assert "failed" not in done.stdout
    listed = json.loads(environment.run(["alignprop", "plugins", "--json"], tmp_path).stdout)["plugins"]
    assert {plugin["distribution"]: (plugin["status"], plugin["rewards"]) for plugin in listed} == {
        "alignprop-template": ("loaded", []),
        **{projects[name].name: ("loaded", [name]) for name in made},
    }
    assert [plugin["warnings"] for plugin in listed if plugin["warnings"]] == []
    # The installed wheels were tested, not the sources beside the tests.
    for name in made:
        code = f"import alignprop_{name} as m; print(m.__file__)"
        where = environment.run(["python", "-c", code], tmp_path).stdout.strip()
        assert Path(where).is_relative_to(environment.site)


@pytest.mark.slow
def test_from_new_to_a_trained_lora(wheels: list[Path], tmp_path: Path) -> None:
    """The commands that `rewards new` prints, and a run on a tiny model."""
    environment = FreshEnvironment(tmp_path / "environment")
    environment.install(*wheels)
    printed = environment.run("alignprop rewards new warm_colors --no-prompts --no-weights", tmp_path).stdout
    commands = [line.strip() for line in printed.splitlines() if line.startswith("  ")]
    assert [command.split()[0] for command in commands] == ["pip", "python", "alignprop"]
    for command in commands:
        done = environment.run(command, tmp_path)
    assert "The reward meets the contract." in done.stdout
    code = (
        "from pathlib import Path; from alignprop_core.testing import train_two_steps;"
        "Path('work').mkdir(); train_two_steps('warm_colors', Path('work'), {'color': [1, 0, 0]})"
    )
    environment.run(["python", "-c", code], tmp_path)
    run = tmp_path / "work" / "run"
    assert (run / "lora" / "pytorch_lora_weights.safetensors").is_file()
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(step["grad_norm"] > 0 for step in steps)


def test_the_project_is_complete_and_accepts_this_core() -> None:
    project = reward_project("warm_colors", prompts=True, weights=True, license="MIT", author="A. N. Other")
    assert set(project) == {
        "pyproject.toml", "README.md", "LICENSE", ".gitignore", ".github/workflows/tests.yml",
        "src/alignprop_warm_colors/__init__.py", "src/alignprop_warm_colors/config.py",
        "src/alignprop_warm_colors/reward.py", "src/alignprop_warm_colors/py.typed",
        "src/alignprop_warm_colors/weights/example.safetensors",
        "tests/test_conformance.py", "tests/test_reward.py",
    }  # fmt: skip
    facts = tomllib.loads(project["pyproject.toml"].decode())["project"]
    assert facts["license"] == "MIT"
    assert "alignprop-plugin" in facts["keywords"]
    from packaging.requirements import Requirement

    (needed,) = (Requirement(line) for line in facts["dependencies"] if line.startswith("alignprop-core"))
    assert needed.specifier.contains(__version__)
    assert not needed.specifier.contains("1.0")
    assert b"A. N. Other" in project["LICENSE"]
    assert facts["authors"] == [{"name": "A. N. Other"}]
    assert not [path for path, data in project.items() if b"<<" in data or b"%%" in data]


@pytest.mark.parametrize("author", ['Ada "the first" Lovelace', "Łukasz \\ Ünal", ""])
def test_any_author_is_in_the_metadata(author: str) -> None:
    project = reward_project("warm", prompts=False, weights=False, license="Apache-2.0", author=author)
    facts = tomllib.loads(project["pyproject.toml"].decode())["project"]
    assert facts.get("authors", [{"name": ""}]) == [{"name": author}]


def test_templates_take_values_and_nested_blocks() -> None:
    text = "a <<x>>\n%% if one\nb\n%% if not two\nc\n%% end\n%% end\nd\n"
    assert render(text, {"x": "1"}, {"one": True, "two": True}) == "a 1\nb\nd\n"
    assert render(text, {"x": "1"}, {"one": True, "two": False}) == "a 1\nb\nc\nd\n"
    assert render(text, {"x": "1"}, {"one": False, "two": False}) == "a 1\nd\n"
    with pytest.raises(KeyError):
        render(text, {}, {"one": True, "two": True})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["WarmColors"], "is not a reward name: use lowercase letters"),
        (["warm__colors"], "is not a reward name"),
        (["../escape"], "is not a reward name"),
        (["warm", "--license", "GPL-3.0"], "is not one of Apache-2.0, MIT, BSD-3-Clause"),
        (["warm", "--to", "full"], "exists already"),
    ],
)
def test_wrong_input_is_one_message_and_writes_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert cli.run(["rewards", "new", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_missing_options_are_asked_for_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import typer

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    asked: list[str] = []
    monkeypatch.setattr(typer, "confirm", lambda text, default: asked.append(text) or "network" in text)
    monkeypatch.setattr(typer, "prompt", lambda text, default: asked.append(text) or "MIT")
    assert cli.run(["rewards", "new", "warm"]) == 0
    assert len(asked) == 3
    assert (tmp_path / "alignprop-warm/src/alignprop_warm/weights/example.safetensors").is_file()
    assert "needs_prompts" not in (tmp_path / "alignprop-warm/src/alignprop_warm/__init__.py").read_text()
    assert (tmp_path / "alignprop-warm/LICENSE").read_text().startswith("MIT License")


def test_new_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from alignprop_core.cli import run; assert run(['rewards', 'new', 'warm', '--weights']) == 0;"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.DEVNULL, timeout=60, check=False)
    assert done.returncode == 0
