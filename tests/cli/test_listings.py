"""The listing commands: fast, without torch, valid JSON, and not affected by broken plugins."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import Field

from alignprop_core import cli
from alignprop_core.cli import checks
from alignprop_core.cli.common import print_table
from alignprop_core.cli.options import options_of
from alignprop_core.config.load import load_config
from alignprop_core.config.yaml import read_yaml
from alignprop_core.errors import OutputError, RewardError
from alignprop_core.registry.registry import Registry, default_registry
from alignprop_core.specs import RewardConfig
from tests.support.fake_plugins import REWARD, install, outside_a_terminal, reward_spec, rewards_hook


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a working plugin that prints and a broken one; no other plugin is allowed."""
    spec = reward_spec(
        "redness",
        "fake_red",
        'unit="points", typical_range=(0, 95), license="MIT", evaluate_with="true_redness", '
        'citation="Someone 2024", '
        'weights=[{"repository": "a/b", "file": "w.safetensors", "bytes": 2000000, "license": "MIT"}]',
    )
    watched = reward_spec("true_redness", "fake_red", "differentiable=False")
    loud = rewards_hook(f"print('HELLO')\nreturn [{spec}, {watched}]") + "\nprint('HELLO')\n"
    install(tmp_path, "fake-red", loud)
    install(tmp_path, "fake-broken", "import no_such_module_here")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("ALIGNPROP_PLUGINS", "fake-red,fake-broken")
    monkeypatch.delenv("ALIGNPROP_BLOCK_PLUGINS", raising=False)
    default_registry.cache_clear()
    yield tmp_path
    default_registry.cache_clear()
    for name in [name for name in sys.modules if name.startswith("fake_")]:
        del sys.modules[name]


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    assert cli.run(arguments) == code
    out, err = capsys.readouterr()
    return out, err


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    return json.loads(run(capsys, *arguments, "--json")[0])


# -- what they print --------------------------------------------------------------------------------------------


def test_plugins_lists_working_and_broken_ones(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, "plugins")
    assert "fake-red" in out
    assert "redness, true_redness" in out
    assert "No module named 'no_such_module_here'" in " ".join(out.split())
    assert "HELLO" not in out.replace('("HELLO")', "")
    assert "--traceback" in err
    assert "Traceback (most recent call last)" in run(capsys, "plugins", "--traceback")[0]


def test_plugins_json_is_valid_json_despite_prints(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = run_json(capsys, "plugins")
    listed = {plugin["distribution"]: plugin for plugin in data["plugins"]}
    assert listed["fake-red"]["status"] == "loaded"
    assert listed["fake-red"]["rewards"] == ["redness", "true_redness"]
    assert "prints when imported" in listed["fake-red"]["warnings"][0]
    assert listed["fake-broken"]["status"] == "failed"
    assert "no_such_module_here" in listed["fake-broken"]["traceback"]
    assert data["api_version"] == 1


def test_plugins_requirements_are_pinned_lines(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "plugins", "--requirements")
    assert "fake-red==1.2" in out.split("\n")
    assert any(line.startswith("alignprop-core==") for line in out.split("\n"))


def test_rewards_list_names_rewards_and_missing_plugins(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, "rewards", "list")
    assert "redness" in out
    assert "0 to 95 points" in out
    assert "evaluation only" in out
    assert "fake-broken is not loaded (failed: ModuleNotFoundError" in err
    data = run_json(capsys, "rewards", "list")
    assert [(reward["full_name"], reward["conflict"]) for reward in data] == [
        ("fake-red/redness", False),
        ("fake-red/true_redness", False),
    ]


def test_a_name_of_two_plugins_is_listed_in_full(
    site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(site, "fake-twin", rewards_hook(f"return [{reward_spec('redness', 'fake_twin')}]"))
    monkeypatch.setenv("ALIGNPROP_PLUGINS", "fake-red,fake-twin")
    default_registry.cache_clear()
    out, _ = run(capsys, "rewards", "list")
    assert "fake-red/redness" in out
    assert "fake-twin/redness" in out
    _, err = run(capsys, "rewards", "show", "redness", code=2)
    assert err.startswith('error: The reward "redness" is offered by fake-red 1.2 and fake-twin 1.2')


def test_rewards_show_prints_facts_options_and_yaml(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "rewards", "show", "redness")
    for text in (
        "redness: Fake.",
        "0 to 95 points",
        "true_redness",
        "MIT",
        "Someone 2024",
        "a/b/w.safetensors, 2.0 MB, MIT",
        "quality",
        "1 to 95",
        "How good.",
    ):
        assert text in out
    data = run_json(capsys, "rewards", "show", "redness")
    quality = data["options"][0]
    assert quality == {
        "name": "quality",
        "type": "integer",
        "required": False,
        "default": 95,
        "description": "How good.",
        "limits": "1 to 95",
    }
    assert data["options_schema"]["properties"]["quality"]["maximum"] == 95
    assert "fake_red.reward" not in sys.modules


def test_rewards_show_with_options_prints_the_preprocessing_of_the_loaded_reward(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = run(capsys, "rewards", "show", "redness", "--options", "quality=7")
    assert "not described by this reward" in out
    code = "    def describe_preprocessing(self):\n        return {}\n"
    described = '{"resize": f"{self.config.size[0]} px, bicubic", "std": [0.5, 0.5, 0.5]}'
    (site / "fake_red" / "reward.py").write_text(REWARD.format(package="fake_red") + code.format(described))
    del sys.modules["fake_red.reward"]
    importlib.invalidate_caches()
    arguments = ("rewards", "show", "redness", "--options", "size=[9, 9]", "-o", "quality=7")
    assert run_json(capsys, *arguments)["preprocessing"] == {"resize": "9 px, bicubic", "std": [0.5, 0.5, 0.5]}
    out, _ = run(capsys, *arguments)
    assert re.search(r"preprocessing: resize +9 px, bicubic *\n", out)
    _, err = run(capsys, "rewards", "show", "redness", "--options", "quality=700", code=2)
    assert "quality" in err
    (site / "fake_red" / "reward.py").write_text(REWARD.format(package="fake_red") + code.format("5  # no mapping"))
    del sys.modules["fake_red.reward"]
    _, err = run(capsys, *arguments, code=1)
    assert "fake-red" in err


@pytest.mark.parametrize("name", ["redness", "true_redness"])
def test_the_yaml_of_rewards_show_loads_when_pasted(site: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    pasted, _ = read_yaml(run_json(capsys, "rewards", "show", name)["yaml"], "pasted")
    data = {
        "model": {"base": "owner/model"},
        "prompts": {"train": "p.txt"},
        "rewards": [{"name": "redness", "label": "other"}],
        "output": "o",
        **pasted,
    }
    config = load_config(data, registry=default_registry())
    assert name in [term.name for term in (*config.rewards, *config.evaluation.rewards)]


def test_an_unknown_reward_is_one_message_and_exit_code_2(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, "rewards", "show", "rednes", code=2)
    assert out == ""
    assert err.startswith('error: No installed plugin offers the reward "rednes". Did you mean "redness"?')
    assert "Traceback" not in err


def test_the_limits_of_an_option_are_described_once() -> None:
    class Config(RewardConfig):
        mean: tuple[float, float, float] | None = None
        pair: tuple[int, int] = (1, 2)
        one: list[int] = Field(default=[1], min_length=1)
        few: list[int] = Field(default=[1], min_length=2, max_length=4)
        most: list[int] = Field(default=[], max_length=5)
        code: str = Field(default="ab", min_length=2, max_length=2)
        share: float = Field(default=0.5, ge=0, le=1)
        count: int = Field(default=1, ge=1)

    assert {option.name: option.limits for option in options_of(Config)} == {
        "mean": "exactly 3 items",
        "pair": "exactly 2 items",
        "one": "at least 1 item",
        "few": "2 to 4 items",
        "most": "at most 5 items",
        "code": "exactly 2 characters",
        "share": "0 to 1",
        "count": "at least 1",
    }


def test_schema_includes_the_installed_rewards(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(run(capsys, "schema")[0])
    assert data["$schema"].endswith("2020-12/schema")
    assert "redness" in data["$defs"]["RewardTerm"]["properties"]["name"]["anyOf"][0]["enum"]
    assert data["$defs"]["fake-red__redness"]["properties"]["quality"]["maximum"] == 95


def test_doctor_finds_the_broken_plugin(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    findings = {finding["what"]: finding for finding in run_json(capsys, "doctor", "--quick")}
    assert findings["python"]["status"] == "ok"
    assert findings["torch"]["status"] == "ok"
    assert findings["plugin fake-broken"]["status"] == "warning"
    assert "no_such_module_here" in findings["plugin fake-broken"]["found"]
    assert "fake-broken" in run(capsys, "doctor", "--quick")[0]


def test_doctor_reports_conflicts_and_misspelled_lists(monkeypatch: pytest.MonkeyPatch, site: Path) -> None:
    install(site, "fake-twin", rewards_hook(f"return [{reward_spec('redness', 'fake_twin')}]"))
    lists = {"ALIGNPROP_PLUGINS": "fake-red,fake-twin,fake-tiwn"}
    monkeypatch.setenv("ALIGNPROP_PLUGINS", lists["ALIGNPROP_PLUGINS"])
    found = [
        finding for finding in checks.check_all(Registry.discover(lists), quick=True) if finding.status == "warning"
    ]
    text = " | ".join(f"{finding.what}: {finding.found} {finding.advice}" for finding in found)
    assert "rewards: redness: offered by 2 plugins Write fake-red/redness or fake-twin/redness" in text
    assert "names fake-tiwn, which is not an installed plugin" in text


def test_doctor_fails_on_a_missing_requirement(
    site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "requires", lambda name: ["no-such-distribution>=3", "pyyaml>=99"])
    monkeypatch.setenv("COLUMNS", "200")  # narrower tables break the command over lines
    out, _ = run(capsys, "doctor", "--quick", code=1)
    assert 'pip install -U "no-such-distribution>=3"' in out
    assert "required is >=99" in out


@pytest.mark.parametrize(
    ("variables", "word"),
    [({"HF_HUB_OFFLINE": "1"}, "offline"), ({"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": ""}, "not set to offline")],
)
def test_doctor_reports_whether_the_hub_is_used(
    variables: dict[str, str], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (hub,) = (f for f in checks.check_all(Registry.from_plugins({}), quick=True) if f.what == "hub")
    assert hub.found.startswith(word)
    assert "online" not in hub.found, "it checks variables only"


# -- errors and exit codes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-command"], "error: No such command 'no-such-command'"),
        (["plugin"], "error: No such command 'plugin'."),
        (["rewards", "show"], "error: Missing argument"),
        (["plugins", "--jsn"], "error: No such option"),
        (
            ["train", "a.yaml", "--training.steps=3"],
            "error: No such option: --training.steps. Did you mean training.steps? Write KEY=VALUE without dashes",
        ),
        (["plugins", "surprise"], "error: Got unexpected extra argument"),
    ],
)
def test_usage_errors_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = run(capsys, *arguments, code=2)
    assert err.startswith(message)
    assert len(err.strip().split("\n")) == 1
    assert "--help`." in err
    assert "?." not in err


def _failing(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", raises)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OutputError("runs/a exists."), 2, "error: runs/a exists."),
        (RewardError("broke"), 1, "error: broke"),
        (OSError(28, "No space left on device", "runs/a"), 1, "error: No space left on device: runs/a"),
        (ValueError("odd"), 1, "error: unexpected ValueError: odd"),
        (KeyboardInterrupt(), 130, "\ninterrupted"),
        (typer.Abort(), 130, "\ninterrupted"),
    ],
)
def test_every_error_is_a_message_and_an_exit_code(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ALIGNPROP_DEBUG", raising=False)
    _failing(error, monkeypatch)
    _, err = run(capsys, "train", code=code)
    assert err.startswith(message)
    assert "Traceback" not in err


@pytest.mark.parametrize("how", ["option", "variable"])
def test_debug_shows_the_traceback(
    how: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _failing(RewardError("broke"), monkeypatch)
    monkeypatch.setenv("ALIGNPROP_DEBUG", "1" if how == "variable" else "0")
    _, err = run(capsys, "train", *(["--debug"] if how == "option" else []), code=1)
    assert "Traceback (most recent call last)" in err
    assert "error: broke" in err


def test_a_plugins_own_traceback_is_shown_without_debug(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ALIGNPROP_DEBUG", raising=False)
    error = RewardError("it could not be built")
    error.add_note("Traceback of the plugin")
    _failing(error, monkeypatch)
    assert "Traceback of the plugin" in run(capsys, "train", code=1)[1]


def test_the_process_exits_with_the_code() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from alignprop_core.cli import main; main()", "rewards", "show", "nothing_like_it"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


# -- light and quick --------------------------------------------------------------------------------------------

LISTINGS = [["--help"], ["plugins"], ["rewards", "list"], ["rewards", "show", "redness"], ["schema"]]


HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "huggingface_hub", "httpx")
SLOW_TO_IMPORT = ("rich", "markdown_it", "yaml", "packaging.requirements")


def assert_not_imported(modules: tuple[str, ...], arguments: list[str], site: Path) -> None:
    """Run a command in a new process, with the plugins in `site`, and check that it imports none of the modules."""
    code = (
        f"import sys; from alignprop_core.cli import run; assert run({arguments!r}) == 0;"
        f"found = {{*{modules!r}}} & set(sys.modules); assert not found, found"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**outside_a_terminal(), "PYTHONPATH": str(site)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["plugins"], ["rewards", "list"]], ids=" ".join)
def test_a_listing_imports_nothing_slow(site: Path, arguments: list[str]) -> None:
    assert_not_imported(SLOW_TO_IMPORT, arguments, site)


@pytest.mark.parametrize("arguments", [*LISTINGS, ["doctor", "--quick"]], ids=" ".join)
def test_listings_import_no_torch(site: Path, arguments: list[str]) -> None:
    assert_not_imported(HEAVY, arguments, site)


def test_a_table_in_a_pipe_has_plain_columns_whatever_its_cells_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    print_table(["name", "score"], [["a" * 150, "1\n2"], ["b"], ["", ""], ["c", 3]])
    wide = "a" * 150
    assert capsys.readouterr().out.splitlines() == [
        "", f"{'name':150}  score", f"{wide}  1", f"{'':150}  2", "b", "", f"{'c':150}  3"
    ]  # fmt: skip


def test_commands_run_with_the_garbage_collector() -> None:
    """It is off only while the command line is read, which imports and creates little that ends."""
    code = (
        "import atexit, gc; from alignprop_core.cli import main; "
        "atexit.register(lambda: print('collects', gc.isenabled())); main()"
    )
    for arguments in (["plugins"], ["rewards", "list"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=outside_a_terminal(),
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines()[-1] == "collects True"
