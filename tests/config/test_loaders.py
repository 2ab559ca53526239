"""A plugin adds a key to reward entries, through the hook for loaders alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml

from alignprop_core.config.load import load_config, resolved_yaml
from alignprop_core.config.rewards import RewardTerm
from alignprop_core.config.schema import json_schema
from alignprop_core.config.sections import RunConfig
from alignprop_core.errors import ConfigError, PluginError
from alignprop_core.evaluation.measures import measure_entries
from alignprop_core.mix.load import load_terms
from alignprop_core.registry.registry import Registry, default_registry
from alignprop_core.reward import ImageBatch
from alignprop_core.testing.fixtures import temporary_plugin  # noqa: F401
from alignprop_core.training.resume import find_checkpoint
from alignprop_core.validation import InvalidConfig
from tests.support import toy_rewards

HOOKS = """\
from alignprop_core.hookspecs import hookimpl
from alignprop_core.specs import LoaderSpec

@hookimpl
def alignprop_register_loaders():
    return [
        LoaderSpec(
            name="{key}", summary="Rewards times a factor.", config="{package}.config:Settings",
            factory="{package}.loader:Scaled",
        )
    ]
"""
CONFIG = '''\
from pydantic import BaseModel, ConfigDict, Field

class Settings(BaseModel):
    """How to scale."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    factor: float = Field(gt=0, description="The factor.")
    table: str | None = Field(default=None, description="A file.", json_schema_extra={"format": "path"})
    title: str = Field(default="./none", description="No path, whatever it looks like.")
'''
LOADER = '''\
class Scaled:
    """The rewards of this environment; a list gets what happened."""

    def __init__(self, config, registry):
        self.config, self.registry = config, registry

    def reward(self, name):
        return self.registry.reward(name)

    def option_names(self, name):
        return self.registry.option_names(name)

    def reward_options(self, name, options=None, *, where="options"):
        return self.registry.reward_options(name, options, where=where)

    def load_reward(self, name, options=None):
        reward = self.registry.load_reward(name, options)
        inner = reward.score
        reward.score = lambda batch: self.config.factor * inner(batch)
        return reward

    def origin(self, name):
        return {"factor": self.config.factor}
'''
REWARDS = """\
from tests.support.toy_rewards import alignprop_register_rewards
"""


@pytest.fixture
def install(temporary_plugin: Callable[..., str]) -> Callable[..., Registry]:  # noqa: F811
    """Install a plugin with the loader `scaled`, and the rewards for tests; return the registry that discovers both."""

    def install(
        distribution: str = "alignprop-scaled", *, key: str = "scaled", config: str = CONFIG, loader: str = LOADER
    ) -> Registry:
        package = distribution.replace("-", "_")
        hooks = HOOKS.replace("{key}", key).replace("{package}", package)
        files = {f"{package}/__init__.py": hooks, f"{package}/config.py": config, f"{package}/loader.py": loader}
        temporary_plugin(distribution, files)
        return default_registry()

    temporary_plugin("toy-rewards", {"toys/__init__.py": REWARDS})
    return install


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    def config(*rewards: dict[str, Any], **more: Any) -> Path:
        (tmp_path / "prompts.txt").write_text("a fox\n")
        (tmp_path / "real.csv").write_text("")
        if not (tmp_path / "table.csv").exists():
            (tmp_path / "table.csv").symlink_to(tmp_path / "real.csv")
        data = {
            "model": {"base": "owner/name"},
            "prompts": {"train": "prompts.txt"},
            "rewards": list(rewards),
            "output": str(tmp_path / "run"),
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(data | more))
        return path

    return config


def scores(path: Path, registry: Registry) -> list[float]:
    images = torch.zeros(1, 3, 8, 8)
    images[:, 0] = 0.5
    terms = load_terms(load_config(path, registry=registry).rewards, registry)
    return [float(term.reward(ImageBatch(images=images))) for term in terms]


def test_a_loader_of_any_plugin_supplies_the_reward(
    install: Callable[..., Registry], config: Callable[..., Path], tmp_path: Path
) -> None:
    registry = install()
    assert [(p.status, p.warnings) for p in registry.plugins if p.distribution == "alignprop-scaled"] == [
        ("loaded", ())
    ]
    scaled = {"name": "redness", "options": {"gain": 2.0}, "scaled": {"factor": 3.0, "table": "table.csv"}}
    path = config(scaled, {"name": "redness", "label": "plain"})
    assert scores(path, registry) == [3.0, 0.5]

    loaded = load_config(path, registry=registry)
    settings = yaml.safe_load(resolved_yaml(loaded))["rewards"][0]["scaled"]
    # Relative to the config, and no link is followed.
    assert settings == {"factor": 3.0, "table": str(tmp_path / "table.csv"), "title": "./none"}
    again = tmp_path / "again.yaml"
    again.write_text(resolved_yaml(loaded))
    assert load_config(again, registry=registry) == loaded
    assert RunConfig.model_validate_json(loaded.model_dump_json()) == loaded
    assert (
        load_config(path, ["rewards.0.scaled.factor=4"], registry=registry).rewards[0].loader
        != loaded.rewards[0].loader
    )

    (measure, plain) = measure_entries(loaded.rewards, registry)
    assert (measure.name, measure.options, measure.loader) == ("red_share", {"gain": 2.0}, loaded.rewards[0].loader)
    assert plain.loader is None


def test_what_is_wrong_under_the_key_is_reported_with_everything_else(
    install: Callable[..., Registry], config: Callable[..., Path]
) -> None:
    registry = install()
    install("alignprop-other", key="other")
    wrong = {"name": "redness", "weight": "much", "scaled": {"factr": 2.0}, "wieght": 2.0}
    with pytest.raises(InvalidConfig) as caught:
        load_config(config(wrong), registry=registry)
    for message in (
        "rewards.0.scaled.factor: is required",
        "rewards.0.scaled.factr: unknown key. Did you mean scaled.factor?",
        "rewards.0.weight: must be a number",
        "rewards.0.wieght: unknown key. Did you mean rewards.0.weight?",
    ):
        assert message in str(caught.value)
    for entry, message in (
        ({"scaled": {"factor": "2"}}, r"rewards\.0\.scaled\.factor: must be a number, not the text"),
        ({"scaled": {"factor": -1.0}}, r"rewards\.0\.scaled\.factor: must be more than 0, not -1"),
        ({"scaled": 2.0}, r"rewards\.0\.scaled: must be a mapping"),
        ({"scald": {"factor": 2.0}}, r"rewards\.0\.scald: unknown key\. Did you mean rewards\.0\.scaled\?"),
        ({"scald": None}, r"rewards\.0\.scald: unknown key"),
        ({"scaled": {"factor": 2.0}, "options": {"gian": 1}}, r"rewards\.0\.options\.gian: unknown key"),
    ):
        with pytest.raises(InvalidConfig, match=message):
            load_config(config({"name": "redness", **entry}), registry=registry)
    both = {"name": "redness", "other": {"factor": 2.0}, "scaled": {"factor": 2.0}}
    with pytest.raises(InvalidConfig, match=r"rewards\.0\.scaled: cannot be combined with other: a reward has"):
        load_config(config(both), registry=default_registry())


def test_null_is_no_loader(install: Callable[..., Registry], config: Callable[..., Path]) -> None:
    registry = install()
    (entry,) = load_config(config({"name": "redness", "scaled": None, "isolation": None}), registry=registry).rewards
    assert entry.loader is None
    assert entry == RewardTerm(name="redness", options={"gain": 1.0})


def test_a_missing_distribution_is_named(config: Callable[..., Path]) -> None:
    registry = toy_rewards.registry()
    entry = {"name": "redness", "isolation": {"python": "env/bin/python"}}
    with pytest.raises(InvalidConfig) as caught:
        load_config(config(entry), registry=registry)
    assert 'rewards.0.isolation: The key "isolation" is in the distribution alignprop-isolation, which is not' in str(
        caught.value
    )
    assert str(caught.value).endswith("pip install alignprop-isolation")
    with pytest.raises(InvalidConfig, match=r"rewards\.0\.scaled: unknown key"):
        load_config(config({"name": "redness", "scaled": {"factor": 2.0}}), registry=registry)


def test_a_key_of_two_distributions_is_refused(install: Callable[..., Registry], config: Callable[..., Path]) -> None:
    install()
    registry = install("alignprop-twin")
    path = config({"name": "redness", "scaled": {"factor": 2.0}})
    with pytest.raises(InvalidConfig, match=r"rewards\.0\.scaled: .*offered by alignprop-scaled .* and alignprop-twin"):
        load_config(path, registry=registry)


BROKEN = {
    "config": ("raise OSError('no disk')\n", LOADER, r"rewards\.0\.scaled: .*config class .*no disk"),
    "no model": ("class Settings: pass\n", LOADER, r"rewards\.0\.scaled: .*must be a subclass of pydantic\.BaseModel"),
    "factory": (CONFIG, "class Scaled:\n    def __init__(self, *_): raise OSError('no disk')\n", "could not be built"),
    "no loader": (CONFIG, "class Scaled:\n    def __init__(self, *_): pass\n", "not a `RewardLoader`"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_loader_is_the_plugins_error(
    install: Callable[..., Registry], config: Callable[..., Path], name: str
) -> None:
    settings, loader, message = BROKEN[name]
    registry = install(config=settings, loader=loader)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(config({"name": "redness", "scaled": {"factor": 2.0}}), registry=registry)
    assert "alignprop-scaled" in str(caught.value)
    # It stops no other entry, and no listing.
    assert load_config(config({"name": "redness"}), registry=registry).rewards[0].loader is None
    assert json_schema(registry)["$defs"]["RewardTerm"]["properties"]["scaled"]
    with pytest.raises(PluginError, match="No installed plugin offers the key"):
        registry.loader("unknown")


def test_settings_may_differ_in_a_resumed_run_and_the_key_may_not(
    install: Callable[..., Registry], config: Callable[..., Path], tmp_path: Path
) -> None:
    registry = install()

    def settings(entry: dict[str, Any]) -> RunConfig:
        return load_config(config({"name": "redness", **entry}), registry=registry)

    checkpoint = tmp_path / "run" / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    (tmp_path / "run" / "config.yaml").write_text(resolved_yaml(settings({"scaled": {"factor": 2.0}})))
    moved = settings({"scaled": {"factor": 3.0, "table": "table.csv"}})
    assert find_checkpoint(tmp_path / "run", moved) == checkpoint
    with pytest.raises(ConfigError, match=r"rewards\.0\.scaled \(was .*, is null\) differs from"):
        find_checkpoint(tmp_path / "run", settings({}))
    (tmp_path / "run" / "config.yaml").write_text(resolved_yaml(settings({})))
    with pytest.raises(ConfigError, match=r"rewards\.0\.scaled \(was null, is .*\) differs from"):
        find_checkpoint(tmp_path / "run", moved)


def test_the_json_schema_knows_the_keys_of_installed_loaders(
    install: Callable[..., Registry], config: Callable[..., Path]
) -> None:
    install()
    registry = install("alignprop-other", key="other")
    schema = json_schema(registry)

    def valid(**entry: Any) -> bool:
        data = yaml.safe_load(config({"name": "redness", **entry}).read_text())
        errors: list[Any] = list(jsonschema.Draft202012Validator(schema).iter_errors(data))
        return not errors

    assert valid()
    assert valid(scaled={"factor": 2.0}, other=None)
    assert not valid(scaled={"factor": 0})
    assert not valid(scaled={"factr": 2.0})
    assert not valid(scald={"factor": 2.0})
    assert not valid(scaled={"factor": 2.0}, other={"factor": 2.0})
    assert schema["$defs"]["RewardTerm"]["properties"]["scaled"]["description"] == "Rewards times a factor."
