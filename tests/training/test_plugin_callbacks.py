"""Callbacks of plugins: an installed distribution watches runs, and cannot break one that did not ask for it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignprop_core.config.load import load_config
from alignprop_core.errors import PluginError
from alignprop_core.registry.registry import Registry
from alignprop_core.testing import train_two_steps
from alignprop_core.training.plugin_callbacks import automatic_callbacks
from alignprop_core.training.trainer import Trainer
from tests.support.fake_plugins import HEAD, install, reward_spec
from tests.support.toy_runs import metrics, toy_data

HOOKS = """\
@hookimpl
def alignprop_register_rewards():
    return [{reward}]

@hookimpl
def alignprop_register_callbacks():
    factory = "{package}.watcher:{kind}"
    return [CallbackSpec(name="{name}", summary="For tests.", factory=factory, automatic={automatic})]
"""

WATCHER = '''\
import json

from alignprop_core import Callback


class Watcher(Callback):
    """Writes what it sees to a file in the run folder."""

    def on_start(self, trainer):
        self.file = trainer.folder.path / "watched.jsonl"

    def write(self, **facts):
        with open(self.file, "a") as file:
            file.write(json.dumps(facts) + "\\n")

    def on_step(self, trainer, stats):
        self.write(step=stats.step, kept_steps=stats.kept_steps)

    def on_end(self, trainer):
        self.write(lora=trainer.folder.lora.is_dir())

    def on_results(self, folder):
        self.file = folder / "watched.jsonl"
        self.write(results=sorted(path.name for path in folder.glob("*.json")))


class Raises(Watcher):
    calls = 0

    def on_step(self, trainer, stats):
        type(self).calls += 1
        raise SystemExit("no network")


class NotBuilt(Watcher):
    def __init__(self):
        raise RuntimeError("no license key")


class Other:
    pass
'''


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith("fake_"):
            del sys.modules[name]


def plugin(site: Path, kind: str = "Watcher", *, automatic: bool = True, name: str = "fake-watcher") -> Registry:
    """Install a distribution with a reward and a callback, and discover it beside what is installed."""
    package = name.replace("-", "_")
    hooks = HOOKS.format(
        reward=reward_spec(package, package), name=package, package=package, kind=kind, automatic=automatic
    )
    install(site, name, HEAD + hooks, files={"watcher.py": WATCHER})
    return Registry.discover({})


def watched(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "watched.jsonl").read_text().splitlines()]


def test_an_automatic_callback_sees_each_step_of_every_run(site: Path, tmp_path: Path) -> None:
    registry = plugin(site)
    folder = train_two_steps("fake_watcher", tmp_path, registry=registry)
    steps = [{"step": row["step"], "kept_steps": row["kept_steps"]} for row in metrics(folder)]
    assert len(steps) == 2
    assert watched(folder) == [*steps, {"lora": True}]
    (folder / "evaluation.json").write_text("{}")
    for callback in automatic_callbacks(registry):
        callback.on_results(folder)
    assert watched(folder)[-1] == {"results": ["environment.json", "evaluation.json"]}


def test_an_automatic_callback_that_raises_is_left_out_and_the_run_continues(site: Path, tmp_path: Path) -> None:
    registry = plugin(site, "Raises")
    with pytest.warns(UserWarning, match="failed") as caught:
        folder = train_two_steps("fake_watcher", tmp_path, registry=registry)
    (message,) = [str(warning.message) for warning in caught]
    assert message == (
        "Callback \"fake_watcher\" of fake-watcher 1.2 failed: it called sys.exit('no network'). "
        "Everything else continues without it."
    )
    assert len(metrics(folder)) == 2
    assert sys.modules["fake_watcher.watcher"].Raises.calls == 1
    assert not (folder / "watched.jsonl").exists(), "none of its methods is called after that"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("NotBuilt", "it could not be built: RuntimeError: no license key"),
        ("Missing", "has no Missing"),
        ("Other", "must be a subclass of alignprop_core.Callback"),
    ],
)
def test_an_automatic_callback_that_cannot_be_built_is_left_out(
    kind: str, message: str, site: Path, tmp_path: Path
) -> None:
    registry = plugin(site, kind)
    with pytest.warns(UserWarning, match=f'"fake_watcher" of fake-watcher 1.2.*{message}'):
        folder = train_two_steps("fake_watcher", tmp_path, registry=registry)
    assert len(metrics(folder)) == 2


def test_any_other_callback_joins_the_runs_that_name_it(site: Path, tiny_model: Path, tmp_path: Path) -> None:
    registry = plugin(site, automatic=False)
    data = toy_data(tiny_model, tmp_path, rewards=[{"name": "fake_watcher"}])
    data["training"]["steps"] = 1
    assert not (Trainer(load_config(data, registry=registry), registry=registry).train() / "watched.jsonl").exists()
    for number, name in enumerate(("fake_watcher", "fake-watcher/fake_watcher")):
        named = data | {"training": data["training"] | {"trackers": [name]}, "output": str(tmp_path / str(number))}
        folder = Trainer(load_config(named, registry=registry), registry=registry).train()
        assert watched(folder)[0]["step"] == 1


def test_a_callback_that_a_run_names_stops_it_when_it_cannot_be_built(
    site: Path, tiny_model: Path, tmp_path: Path
) -> None:
    registry = plugin(site, "NotBuilt", automatic=False)
    data = toy_data(tiny_model, tmp_path, rewards=[{"name": "fake_watcher"}])
    data["training"] |= {"steps": 1, "trackers": ["fake_watcher"]}
    with pytest.raises(PluginError, match="RuntimeError: no license key"):
        Trainer(load_config(data, registry=registry), registry=registry).train()
    assert not (tmp_path / "run").exists()


def test_a_tracker_of_two_distributions_is_an_error_that_names_both(
    site: Path, tiny_model: Path, tmp_path: Path
) -> None:
    plugin(site, automatic=False, name="fake-watcher")
    reward = reward_spec("other", "fake_other")
    hooks = HOOKS.format(reward=reward, name="fake_watcher", package="fake_other", kind="Watcher", automatic=False)
    install(site, "fake-other", HEAD + hooks, files={"watcher.py": WATCHER})
    registry = Registry.discover({})
    data = toy_data(tiny_model, tmp_path, rewards=[{"name": "fake_watcher"}])
    data["training"]["trackers"] = ["fake_watcher"]
    with pytest.raises(PluginError, match=r'trackers\.0: .*"fake_watcher".*fake-other 1\.2 and fake-watcher 1\.2'):
        Trainer(load_config(data, registry=registry), registry=registry).train()


def test_an_unknown_tracker_is_reported_with_the_nearest_name(site: Path, tiny_model: Path, tmp_path: Path) -> None:
    registry = plugin(site, automatic=False)
    data = toy_data(tiny_model, tmp_path, rewards=[{"name": "fake_watcher"}])
    data["training"]["trackers"] = ["fake_watchers"]
    with pytest.raises(PluginError, match=r'trackers\.0: .*Did you mean "fake_watcher"\?'):
        Trainer(load_config(data, registry=registry), registry=registry).train()
