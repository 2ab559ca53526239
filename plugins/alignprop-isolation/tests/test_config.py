"""Options and settings of an isolated reward in a run config: checked early, reported with the config's keys."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignprop_core.config.load import load_config, resolved_yaml
from alignprop_core.config.schema import json_schema
from alignprop_core.errors import PluginError, RewardError
from alignprop_core.registry.licenses import LicensePolicy
from alignprop_core.registry.registry import Registry, default_registry
from alignprop_core.training.trainer import Trainer
from alignprop_core.validation import InvalidConfig
from alignprop_isolation.config import IsolationConfig
from alignprop_isolation.lookup import IsolatedRewards

jpeg = pytest.mark.skipif(find_spec("alignprop_jpeg") is None, reason="alignprop-jpeg is not installed")

Config = Callable[..., Path]
RewardsOf = Callable[..., IsolatedRewards]


def test_options_are_checked_there_with_the_keys_of_the_run_config(
    python: Path, file: Path, config_file: Config
) -> None:
    term = {"name": f"{file}:Redness", "isolation": {"python": str(python)}}
    with pytest.raises(InvalidConfig) as caught:
        load_config(config_file({**term, "options": {"gian": 1.0, "gain": -1}}))
    assert "rewards.0.options.gain" in str(caught.value)
    assert "rewards.0.options.gian: unknown key. Did you mean options.gain?" in str(caught.value)
    for isolation, message in (
        ({"python": "nowhere/bin/python"}, r"rewards\.0\.name: .*nowhere/bin/python: no such file.*rewards isolate"),
        ({"python": str(python), "timeout": 0}, r"rewards\.0\.isolation\.timeout: must be more than 0, not 0\."),
        ({"python": str(python), "timeout": "9"}, r"rewards\.0\.isolation\.timeout: must be a number, not the text"),
        ({"pyhton": str(python)}, r"rewards\.0\.isolation\.pyhton: unknown key\. Did you mean isolation\.python\?"),
        (str(python), r"rewards\.0\.isolation: must be a mapping"),
        ({"python": "/bin/cat"}, r"cannot describe its rewards"),
    ):
        with pytest.raises(InvalidConfig, match=message):
            load_config(config_file({**term, "isolation": isolation}))
    with pytest.raises(InvalidConfig, match=r"rewards\.0\.isolatoin: unknown key\. Did you mean rewards\.0\.isolation"):
        load_config(config_file({"name": f"{file}:Redness", "isolatoin": {"python": str(python)}}))


@jpeg
def test_the_nearest_name_is_one_of_that_environment(python: Path, config_file: Config) -> None:
    misspelt = {"name": "jpeg_compresibility", "isolation": {"python": str(python)}}
    with pytest.raises(InvalidConfig, match=r'rewards\.0\.name: .*Did you mean "jpeg_compressibility".*environment of'):
        load_config(config_file(misspelt))


def test_the_settings_survive_in_the_resolved_config(
    python: Path, file: Path, config_file: Config, tmp_path: Path
) -> None:
    """The path is absolute, and the link that a virtual environment's Python is stays a link."""
    assert python.is_symlink()
    settings = {"python": os.path.relpath(python, tmp_path), "timeout": 9.0}
    path = config_file({"name": f"{file}:Redness", "isolation": settings})
    (term,) = yaml.safe_load(resolved_yaml(load_config(path)))["rewards"]
    defaults = {"device": "auto", "timeout": 300.0, "start_timeout": 900.0, "memory_limit": None}
    assert term["isolation"] == {**defaults, "python": str(python), "timeout": 9.0}
    again = path.with_name("again.yaml")
    again.write_text(resolved_yaml(load_config(path)))
    assert load_config(again) == load_config(path)
    assert load_config(again).rewards[0].loader == ("isolation", IsolationConfig(python=str(python), timeout=9.0))


def test_null_is_no_isolation(file: Path, config_file: Config, tmp_path: Path) -> None:
    here = tmp_path / "here.py"
    here.write_text(file.read_text().replace("import only_there\n", "").replace("only_there.GAIN", "2.0"))
    config = load_config(config_file({"name": f"{here}:Redness", "isolation": None}))
    assert config.rewards[0].loader is None
    assert "isolation" not in yaml.safe_load(resolved_yaml(config))["rewards"][0]


def test_without_the_plugin_the_key_names_what_to_install(python: Path, file: Path, config_file: Config) -> None:
    path = config_file({"name": f"{file}:Redness", "isolation": {"python": str(python)}})
    with pytest.raises(InvalidConfig, match=r"rewards\.0\.isolation: .*not installed.*pip install alignprop-isolation"):
        load_config(path, registry=Registry([]))
    blocked = Registry.discover({"ALIGNPROP_BLOCK_PLUGINS": "alignprop-isolation"})
    with pytest.raises(
        InvalidConfig, match=r"rewards\.0\.isolation: .*alignprop-isolation, which is not loaded \(blocked"
    ):
        load_config(path, registry=blocked)


def test_the_json_schema_has_the_key() -> None:
    term = json_schema(default_registry())["$defs"]["RewardTerm"]
    assert term["additionalProperties"] is False
    settings = json_schema(default_registry())["$defs"]["loader__isolation"]
    assert term["properties"]["isolation"]["anyOf"][0] == {"$ref": "#/$defs/loader__isolation"}
    assert settings["required"] == ["python"]
    assert all(field["description"] for field in settings["properties"].values())


def test_a_measure_is_not_trained_on(python: Path, file: Path, config_file: Config) -> None:
    """That it can be evaluated, a run in test_scores.py shows."""
    isolation = {"python": str(python)}
    with pytest.raises(InvalidConfig, match="gives no gradient to train on"):
        load_config(config_file({"name": f"{file}:Measure", "isolation": isolation}))
    detached = {"name": f"{file}:Redness", "label": "detached", "options": {"does": "detach"}, "isolation": isolation}
    with pytest.raises(RewardError, match=r'Reward "detached".*returned scores without a gradient'):
        Trainer(load_config(config_file(detached)))


@jpeg
def test_the_license_policy_applies_there_too(python: Path, rewards_of: RewardsOf) -> None:
    only_mit = Registry([], licenses=LicensePolicy.read({"ALIGNPROP_ALLOW_LICENSES": "MIT"}))
    with pytest.raises(PluginError, match=r"its licen[cs]e is Apache-2\.0"):
        rewards_of(python, registry=only_mit).reward("jpeg_compressibility")


def fake_python(folder: Path, script: str) -> Path:
    fake = folder / "own" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    return fake


def test_an_incompatible_core_there_is_reported(tmp_path: Path, rewards_of: RewardsOf) -> None:
    fake = fake_python(tmp_path, 'echo \'{"protocol": 99, "core": "7.0"}\'')
    with pytest.raises(PluginError, match=r"has alignprop-core 7\.0, which is not compatible with this one"):
        rewards_of(fake).reward("jpeg_compressibility")


def test_an_environment_without_the_worker_says_what_to_do(tmp_path: Path, rewards_of: RewardsOf) -> None:
    """As one that was created before the worker was a distribution of its own."""
    # -I -S: an interpreter without any packages, asked for the same module.
    fake = fake_python(tmp_path, f'shift; exec {sys.executable} -I -S "$@"')
    again = rf"Remove {tmp_path}/own and create it again: alignprop rewards isolate red --into {tmp_path}/own"
    with pytest.raises(PluginError, match=rf"alignprop-isolation is not installed there\. {again}"):
        rewards_of(fake).reward("red")


def test_settings_in_python_are_checked(python: Path) -> None:
    with pytest.raises(ValueError, match="memory_limit"):
        IsolationConfig(python=str(python), memory_limit=0.0)
    wrong: dict[str, Any] = {"pyhton": str(python)}
    with pytest.raises(ValueError, match="pyhton"):
        IsolationConfig(**wrong)
