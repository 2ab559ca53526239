"""Many plugins, and many broken ones: listings stay quick and whole, runs import what they name and nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.registry.test_registry import BROKEN
from tests.support.fake_plugins import install, outside_a_terminal, reward_spec, rewards_hook
from tests.support.processes import command_line

# The ways a plugin can be broken that test_registry has not: they load, or are found out only when they are named.
LATE = {
    "duplicate-one": ({"module": rewards_hook(f"return [{reward_spec('twice', 'fake_duplicate_one')}]")}, "loaded"),
    "duplicate-two": ({"module": rewards_hook(f"return [{reward_spec('twice', 'fake_duplicate_two')}]")}, "loaded"),
    "missing-factory": ({"reward": "Other = 1"}, "loaded"),
    "bad-config": ({"config": "class Options: pass"}, "loaded"),
    "slow-import": (
        {
            "module": "import time; time.sleep(1.1)\n"
            + rewards_hook(f"return [{reward_spec('slow', 'fake_slow_import')}]")
        },
        "loaded",
    ),
    "prints": (
        {"module": "print('HELLO')\n" + rewards_hook(f"return [{reward_spec('prints', 'fake_prints')}]")},
        "loaded",
    ),
}
# A line without "=" makes importlib.metadata raise for whoever asks for any entry point. pydantic and torch do when
# they are imported, so beside such an installation no program that uses them starts, ours or another's.
FOUND = {kind: facts for kind, facts in BROKEN.items() if kind != "no-value"}
TRAIN = """
import sys
from pathlib import Path
from alignprop_core.cli import run
from alignprop_core.testing import train_two_steps
train_two_steps("fake_works", Path(sys.argv[1]), {"quality": 3})
mine = sorted(name for name in sys.modules if name.startswith("fake_") and "." in name)
assert mine == ["fake_works.config", "fake_works.reward"], mine
assert run(["rewards", "check", "fake_missing_factory"]) == 2
"""


def environment(*sites: Path) -> dict[str, str]:
    left_out = ("ALIGNPROP_", "PYTHONDONTWRITEBYTECODE")
    kept = {name: value for name, value in outside_a_terminal().items() if not name.startswith(left_out)}
    return {**kept, "PYTHONPATH": os.pathsep.join(map(str, sites))}


def alignprop(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return command_line(arguments, environment(site))


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("broken")
    for kind, (arguments, *_) in {**FOUND, **LATE}.items():
        install(site, f"fake-{kind}", **arguments)  # type: ignore[arg-type]
    install(site, "fake-works")
    return site


def test_the_listings_hold_with_every_kind_of_broken_plugin_at_once(broken: Path) -> None:
    done = alignprop(broken, "plugins", "--json")
    assert done.returncode == 0, done.stderr
    listed = {plugin["distribution"]: plugin for plugin in json.loads(done.stdout)["plugins"]}
    for kind, (_, status, message) in FOUND.items():
        assert listed[f"fake-{kind}"]["status"] == status
        assert message in listed[f"fake-{kind}"]["error"]
    for kind, (_, status) in LATE.items():
        assert listed[f"fake-{kind}"]["status"] == status
    assert re.search(r"took \d", listed["fake-slow-import"]["warnings"][0])
    assert "prints when imported" in listed["fake-prints"]["warnings"][0]
    rewards = alignprop(broken, "rewards", "list")
    assert rewards.returncode == 0
    assert "HELLO" not in rewards.stdout
    for name in ("fake-duplicate-one/twice", "fake-duplicate-two/twice", "fake_works"):
        assert name in rewards.stdout
    assert "fake-import-error is not loaded" in rewards.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("twice", "offered by fake-duplicate-one 1.2 and fake-duplicate-two 1.2"),
        ("fake_bad_config", "must be a subclass of alignprop_core.RewardConfig"),
    ],
)
def test_what_is_wrong_with_a_reward_is_said_when_it_is_named(broken: Path, name: str, message: str) -> None:
    done = alignprop(broken, "rewards", "show", name)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.fixture(scope="module")
def fifty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("fifty")
    for number in range(50):
        install(site, f"fake-number{number}")
    return site


def test_a_run_is_unaffected_by_them_and_imports_code_only_of_what_it_names(
    broken: Path, fifty: Path, tmp_path: Path
) -> None:
    """Beside all the broken ones and fifty that work. A check imports as much, and says that a factory is missing."""
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(tmp_path)],
        env=environment(broken, fifty), capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert "fake_missing_factory.reward:Fake does not exist" in done.stderr
