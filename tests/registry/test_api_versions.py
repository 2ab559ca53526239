"""Versions of the plugin contract: old plugins load, deprecated ones say so, newer ones are not imported."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from alignprop_core import specs
from alignprop_core.registry import discovery
from alignprop_core.registry.discovery import PluginRecord
from alignprop_core.registry.registry import Registry, default_registry
from alignprop_core.specs import RewardSpec
from alignprop_core.testing.fixtures import temporary_plugin  # noqa: F401
from tests.support.fake_plugins import CONFIG, REWARD, reward_spec, rewards_hook

Install = Callable[..., str]


def install(temporary_plugin: Install, more: str = "", **facts: object) -> None:  # noqa: F811
    files = {
        "fake_old/__init__.py": rewards_hook(f"return [{reward_spec('fake_old', 'fake_old', more)}]"),
        "fake_old/config.py": CONFIG,
        "fake_old/reward.py": REWARD.replace("{package}", "fake_old"),
    }
    temporary_plugin("fake-old", files, **facts)


def record() -> PluginRecord:
    (found,) = (r for r in Registry.discover({"ALIGNPROP_PLUGINS": "fake-old"}).plugins if r.distribution == "fake-old")
    return found


@pytest.fixture
def later_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """A core two contracts on, which takes 1 still and wants to be rid of it."""
    monkeypatch.setattr(discovery, "API_VERSION", 3)
    monkeypatch.setattr(
        discovery, "DEPRECATED_API_VERSIONS", {1: "give api_version=3; core 0.9 is the last to take it"}
    )


@pytest.mark.usefixtures("later_core")
@pytest.mark.parametrize("more", ["", "api_version=1"], ids=["says nothing", "says 1"])
def test_a_plugin_of_an_old_contract_loads_works_and_says_it_is_deprecated(
    temporary_plugin: Install,  # noqa: F811
    more: str,
) -> None:
    install(temporary_plugin, more)
    found = record()
    assert found.status == "loaded"
    assert found.warnings == (
        "written for plugin API 1, which is deprecated: give api_version=3; core 0.9 is the last to take it",
    )
    reward = default_registry().load_reward("fake_old", {"quality": 7})
    assert reward.config.model_dump()["quality"] == 7


@pytest.mark.usefixtures("later_core")
def test_a_plugin_of_the_contract_between_loads_without_a_word(temporary_plugin: Install) -> None:  # noqa: F811
    install(temporary_plugin, "api_version=2")
    assert (record().status, record().warnings) == ("loaded", ())


def test_a_contract_no_longer_taken_names_the_plugin_to_upgrade(
    temporary_plugin: Install,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(discovery, "API_VERSION", 3)
    monkeypatch.setattr(discovery, "OLDEST_API_VERSION", 2)
    install(temporary_plugin)
    assert record().status == "incompatible"
    assert "written for plugin API 1, this core knows 2 to 3; upgrade the plugin" in str(record().error)


def test_a_newer_contract_names_the_core_to_upgrade(temporary_plugin: Install) -> None:  # noqa: F811
    install(temporary_plugin, f"api_version={specs.API_VERSION + 1}")
    assert record().status == "incompatible"
    assert "upgrade the core: pip install -U alignprop-core" in str(record().error)


def test_a_plugin_for_a_newer_core_is_reported_and_not_imported(temporary_plugin: Install) -> None:  # noqa: F811
    install(temporary_plugin, requires=("alignprop-core>=99",))
    assert record().status == "incompatible"
    assert "it requires alignprop-core>=99" in str(record().error)
    assert "fake_old" not in sys.modules


def test_a_spec_that_says_no_version_is_of_the_first_contract_whatever_core_reads_it() -> None:
    assert RewardSpec.model_fields["api_version"].default == 1
    assert specs.OLDEST_API_VERSION <= 1 <= specs.API_VERSION
    assert set(specs.DEPRECATED_API_VERSIONS) <= set(range(specs.OLDEST_API_VERSION, specs.API_VERSION))
