"""ALIGNPROP_ALLOW_LICENSES: read from metadata, before anything of a plugin is imported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from alignprop_core.cli import run
from alignprop_core.errors import PluginError, WeightsError
from alignprop_core.registry.licenses import LICENSES_VARIABLE, LicensePolicy
from alignprop_core.registry.registry import Registry, default_registry
from alignprop_core.specs import WeightsFile, WeightsSpec
from alignprop_core.testing.fixtures import temporary_plugin  # noqa: F401
from alignprop_core.weights import find_weights
from tests.support.fake_plugins import CONFIG, HEAD, REWARD, reward_spec, rewards_hook


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("mit", True),
        ("Apache-2.0", True),
        ("AGPL-3.0-only", False),
        ("MIT AND Apache-2.0", True),
        ("MIT AND AGPL-3.0-only", False),
        ("MIT OR AGPL-3.0-only", True),
        ("AGPL-3.0-only OR MIT", True),
        ("AGPL-3.0-only OR GPL-3.0-only", False),
        ("AGPL-3.0-only AND MIT OR Apache-2.0", True),
        ("AGPL-3.0-only AND (MIT OR Apache-2.0)", False),
        ("(MIT)", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("GPL-2.0-only WITH Classpath-exception-2.0", False),
        ("Apache-2.0+", True),
        ("", False),
        ("see LICENSE file", False),
        ("MIT AND", False),
        ("(MIT", False),
        ("MIT)", False),
        ("MIT WITH", False),
        ("AGPL-3.0-only AND", False),
        ("openrail-m", True),
        ("OpenRAIL-M OR MIT", False),
    ],
)
def test_expressions(expression: str, allowed: bool) -> None:
    policy = LicensePolicy.read({LICENSES_VARIABLE: "MIT, apache-2.0, OpenRAIL-M"})
    problem = policy.problem(expression)
    assert (problem is None) is allowed
    assert problem is None or LICENSES_VARIABLE in problem
    assert LicensePolicy().problem(expression) is None


def test_a_list_that_is_set_and_empty_allows_nothing() -> None:
    assert LicensePolicy.read({}).allowed is None
    assert "allows only nothing" in str(LicensePolicy.read({LICENSES_VARIABLE: ""}).problem("MIT"))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("fake_")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("metadata", "license"),
    [
        ("License-Expression: AGPL-3.0-or-later", "AGPL-3.0-or-later"),
        ("License: MIT", "MIT"),
        ("License-Expression: MIT\nLicense: other", "MIT"),
        ("Classifier: License :: OSI Approved :: MIT License", "MIT"),
        (
            "Classifier: License :: OSI Approved :: MIT License\n"
            "Classifier: License :: OSI Approved :: GNU Affero General Public License v3",
            "MIT AND AGPL-3.0-only",
        ),
        ("Classifier: License :: OSI Approved :: BSD License", ""),
        ("License: a text that goes on\n        for several lines", ""),
        ("Summary: says nothing", ""),
    ],
)
def test_metadata_decide_before_anything_is_imported(metadata: str, license: str, site: Path) -> None:
    (site / "fake_licensed.py").write_text(rewards_hook("return []"))
    info = site / "fake_licensed-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: fake-licensed\nVersion: 1\n{metadata}\n")
    (info / "entry_points.txt").write_text("[alignprop]\nmain = fake_licensed\n")
    allow = {"ALIGNPROP_PLUGINS": "fake-licensed"}
    (record,) = (
        r for r in Registry.discover({**allow, LICENSES_VARIABLE: "MIT"}).plugins if r.distribution == "fake-licensed"
    )
    assert record.license == license
    if license == "MIT":
        assert record.status == "loaded"
    else:
        assert record.status == "not allowed"
        assert (license or "declares no license") in str(record.error)
        assert "fake_licensed" not in sys.modules
    records = {r.distribution: r for r in Registry.discover(allow).plugins}
    assert records["fake-licensed"].status == "loaded", "without a policy everything is allowed"


def test_listings_say_what_is_not_allowed(
    temporary_plugin: Callable[..., str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ALIGNPROP_PLUGINS", "fake-agpl")
    monkeypatch.setenv(LICENSES_VARIABLE, "MIT")
    temporary_plugin("fake-agpl", {"fake_agpl/__init__.py": rewards_hook("return []")}, license="AGPL-3.0-only")
    assert run(["plugins"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "not allowed" in out
    assert "its license is AGPL-3.0-only, and ALIGNPROP_ALLOW_LICENSES allows only mit" in out


def test_a_rewards_own_license_counts_and_its_code_is_not_imported(
    temporary_plugin: Callable[..., str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(LICENSES_VARIABLE, "MIT")
    spec = reward_spec("fake_red", "fake_red", 'license="CC-BY-NC-4.0"')
    files = {"fake_red/config.py": CONFIG, "fake_red/reward.py": REWARD.replace("{package}", "fake_red")}
    temporary_plugin("fake-red", {"fake_red/__init__.py": rewards_hook(f"return [{spec}]"), **files}, license="MIT")
    for use in (default_registry().reward_options, default_registry().load_reward):
        with pytest.raises(PluginError, match=r'Reward "fake_red" .* its license is CC-BY-NC-4\.0'):
            use("fake_red")
    assert "fake_red.config" not in sys.modules
    monkeypatch.delenv(LICENSES_VARIABLE)
    default_registry.cache_clear()
    default_registry().load_reward("fake_red")


def test_declared_weights_are_held_to_it_and_files_of_the_users_own_are_not(
    temporary_plugin: Callable[..., str],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = tmp_path / "own.safetensors"
    own.touch()
    hook = f'{HEAD}@hookimpl\ndef alignprop_register_weights():\n    return [{WeightsSpec.__name__}(name="small", '
    hook += 'reward="fake_red", summary="s", path="fake_red:w.safetensors", license="CC-BY-NC-4.0")]\n'
    temporary_plugin("fake-red", {"fake_red/__init__.py": hook, "fake_red/w.safetensors": ""}, license="MIT")
    default = WeightsFile(file="fake_red:w.safetensors", license="OpenRAIL-M")
    assert find_weights("default", reward="fake_red", default=default).name == "w.safetensors"
    assert find_weights("small", reward="fake_red").name == "w.safetensors"
    monkeypatch.setenv(LICENSES_VARIABLE, "MIT")
    default_registry.cache_clear()
    with pytest.raises(WeightsError, match=r"default weights of reward .* its license is OpenRAIL-M"):
        find_weights("default", reward="fake_red", default=default)
    with pytest.raises(WeightsError, match=r'Weights "small" of fake-red .* CC-BY-NC-4\.0'):
        find_weights("small", reward="fake_red")
    assert find_weights(str(own), reward="fake_red") == own
