"""Rewards from Python and from a file: no packaging, the same checks and logs, and nothing run that was not named."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from pydantic import Field

from alignprop_core import train
from alignprop_core.config import RunConfig, load_config, parse_config
from alignprop_core.config_errors import InvalidConfig
from alignprop_core.errors import PluginError, RewardError
from alignprop_core.local_rewards import from_file, public_name
from alignprop_core.reward import Reward
from alignprop_core.specs import RewardConfig
from alignprop_core.training import Trainer
from tests.toy_rewards import NoGradient, Redness, RednessConfig, registry

FILE = '''\
"""Rewards of mine."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from alignprop_core import ImageBatch, Reward, RewardConfig


class Options(RewardConfig):
    gain: float = Field(default=2.0, gt=0, description="Factor.")
    channels: tuple[int, ...] = Field(default=(0,), description="Which.")


class MyRedness(Reward):
    """Red pictures."""

    Config = Options
    config: Options

    def score(self, batch: ImageBatch) -> Tensor:
        return self.config.gain * batch.images[:, list(self.config.channels)].mean((1, 2, 3))


class Plain(Reward):
    def score(self, batch: ImageBatch) -> Tensor:
        return batch.images.mean((1, 2, 3))


class Detached(Plain):
    def score(self, batch: ImageBatch) -> Tensor:
        return super().score(batch).detach()


class Measure(Plain):
    differentiable = False

    def score(self, batch: ImageBatch) -> Tensor:
        return super().score(batch).detach()


class NoReward:
    pass
'''


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> Path:
    """A folder with a config, prompts and a file of rewards."""
    (tmp_path / "my_rewards.py").write_text(FILE)
    (tmp_path / "prompts.txt").write_text("a fox\nan owl\n")
    return tmp_path


@pytest.fixture
def data(folder: Path, tiny_model: Path) -> Callable[..., dict[str, Any]]:
    def build(*rewards: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {
            "model": {"base": str(tiny_model)},
            "prompts": {"train": "./prompts.txt", "heldout": "./prompts.txt"},
            "sampling": {"steps": 2, "guidance_scale": 1.0},
            "rewards": list(rewards),
            "training": {"steps": 2, "batch_size": 2, "device": "cpu"},
            "samples": {"every": None},
            "evaluation": {"images_per_prompt": 1, **more.pop("evaluation", {})},
            "output": str(folder / "run"),
            **more,
        }

    return build


def parse(folder: Path, data: dict[str, Any], **options: Any) -> RunConfig:
    return parse_config(data, registry=options.pop("registry", registry()), folder=folder, **options)


def refused(folder: Path, data: dict[str, Any], **options: Any) -> dict[str, str]:
    with pytest.raises(InvalidConfig) as caught:
        parse(folder, data, **options)
    return {problem.key: problem.message for problem in caught.value.problems}


# -- from a file ------------------------------------------------------------------------------------------------------


def test_a_class_in_a_file_trains_with_the_logs_of_a_plugin(folder: Path, data: Callable[..., dict[str, Any]]) -> None:
    terms = {"name": "./my_rewards.py:MyRedness", "ceiling": 5.0, "options": {"gain": 3.0}}
    config = parse(folder, data(terms, {"name": "redness"}))
    assert config.rewards[0].name == f"{folder / 'my_rewards.py'}:MyRedness"
    assert config.rewards[0].label == "my_redness"
    assert config.rewards[0].options == {"gain": 3.0, "channels": [0]}
    run = train(config, registry=registry())
    (first, _) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert first["terms"]["my_redness"]["weighted"] == first["terms"]["my_redness"]["raw"]
    assert "my_redness" in json.loads((run / "evaluation.json").read_text())["tuned"]
    told = json.loads((run / "environment.json").read_text())
    assert told["local_rewards"][config.rewards[0].name]["class"] == "MyRedness"
    assert len(told["local_rewards"][config.rewards[0].name]["sha256"]) == 64
    assert told["plugins"].keys() == {"toy-rewards"}


def test_the_saved_config_resumes(folder: Path, data: Callable[..., dict[str, Any]]) -> None:
    run = train(parse(folder, data({"name": "./my_rewards.py:Plain"})), registry=registry())
    saved = load_config(run / "config.yaml", ["training.steps=3"], registry=registry())
    train(saved, registry=registry(), resume=run)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


def test_the_maker_s_folders_stay_out_of_the_lora(folder: Path, data: Callable[..., dict[str, Any]]) -> None:
    from safetensors import safe_open

    run = train(parse(folder, data({"name": "./my_rewards.py:Plain"})), registry=registry())
    for file in (run / "lora").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert str(folder / "my_rewards") not in json.dumps(opened.metadata())
    assert public_name("/home/me/my_rewards.py:Plain") == "my_rewards.py:Plain"
    assert public_name("dist/reward") == "dist/reward"


def test_the_code_that_runs_is_the_source_and_nothing_is_written_beside_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = folder / "quick.py"
    source = FILE + "\nEDITION = 1\n"
    file.write_text(source)
    time = file.stat().st_mtime_ns
    first = from_file(f"{file}:Plain")
    # An edit of the same length within the clock's grain: a compiled file would still look fresh.
    file.write_text(source.replace("EDITION = 1", "EDITION = 2"))
    os.utime(file, ns=(time, time))
    second = from_file(f"{file}:Plain")
    assert first is not None
    assert second is not None
    assert first.sha256 != second.sha256
    assert [sys.modules[found.kind.__module__].EDITION for found in (first, second)] == [1, 2]
    assert not (folder / "__pycache__").exists()


def test_an_edited_file_is_read_anew(folder: Path) -> None:
    name = f"{folder / 'my_rewards.py'}:Plain"
    first = registry().load_reward(name)
    (folder / "my_rewards.py").write_text(FILE.replace("class Plain(Reward):", "class Plain(Reward):\n    extra = 7\n"))
    again = registry().load_reward(name)
    assert not hasattr(first, "extra")
    assert again.extra == 7


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my_rewards.py:Plain", ["write its path out", "./my_rewards.py:Plain"]),
        ("./missing.py:Plain", ["missing.py", "cannot be read"]),
        ("./my_rewards.py:Plane", ["Did you mean", "Plain"]),
        ("./my_rewards.py:Zebra", ["its rewards are MyRedness, Plain"]),
        ("./my_rewards.py:", ["class named after the colon"]),
        ("./my_rewards.py:NoReward", ["no subclass of"]),
        ("./my_rewards.py:Reward", ["no subclass of"]),
        ("./broken.py:Plain", ["broken.py", "ZeroDivisionError"]),
        ("./leaves.py:Plain", ["leaves.py", "sys.exit"]),
        ("./my_rewards.py:Measure", ["no gradient", "use it under evaluation.rewards"]),
        ("./my_rewards.py", ["No installed plugin offers"]),
    ],
)
def test_what_is_wrong_with_a_file_is_said_at_its_key(
    folder: Path, data: Callable[..., dict[str, Any]], name: str, words: list[str]
) -> None:
    (folder / "broken.py").write_text("1 / 0\n")
    (folder / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    found = refused(folder, data({"name": name}))
    assert list(found) == ["rewards.0.name"]
    for word in words:
        assert word in found["rewards.0.name"], found


def test_options_of_a_file_are_checked_like_a_plugins(folder: Path, data: Callable[..., dict[str, Any]]) -> None:
    found = refused(folder, data({"name": "./my_rewards.py:MyRedness", "options": {"gian": 1.0, "gain": -1.0}}))
    assert found.keys() == {"rewards.0.options.gian", "rewards.0.options.gain"}
    assert "Did you mean" in found["rewards.0.options.gian"]


def test_a_measure_in_a_file_is_watched(folder: Path, data: Callable[..., dict[str, Any]]) -> None:
    watched = {"evaluation": {"rewards": [{"name": "./my_rewards.py:Measure"}]}}
    run = train(parse(folder, data({"name": "redness"}, **watched)), registry=registry())
    assert "measure" in json.loads((run / "evaluation.json").read_text())["tuned"]


def test_a_file_without_a_gradient_is_refused_before_a_model_loads(
    folder: Path, data: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("alignprop_core.training.trainer.load_pipeline", load)
    config = parse(folder, data({"name": "./my_rewards.py:Detached"}))
    with pytest.raises(RewardError, match=r'"detached" returned scores without.*use it under evaluation\.rewards'):
        Trainer(config, registry=registry())
    with pytest.raises(RewardError, match=r'"mine" returned scores without a gradient'):
        Trainer(parse(folder, data({"name": "redness"})), registry=registry(), rewards={"mine": NoGradient()})


def test_paths_on_the_command_line_start_in_the_working_directory(
    folder: Path, data: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "other.py").write_text(FILE)
    monkeypatch.chdir(elsewhere)
    config = parse(folder, data({"name": "redness"}), overrides=["rewards.0.name=./other.py:Plain"])
    assert config.rewards[0].name == f"{elsewhere / 'other.py'}:Plain"


def test_the_cli_shows_the_traceback_of_the_file(
    folder: Path, data: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    from alignprop_core.cli import run

    (folder / "broken.py").write_text(
        dedent("""\
        def inner():
            return {}["key"]

        inner()
        """)
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(data({"name": "./broken.py:Plain"})))
    assert run(["train", str(folder / "run.yaml")]) == 2
    assert "KeyError: 'key'" in capsys.readouterr().err


# -- from Python ------------------------------------------------------------------------------------------------------


def test_an_object_trains_under_its_name(folder: Path, data: Callable[..., dict[str, Any]]) -> None:
    import yaml

    path = folder / "run.yaml"
    sections = data({"name": "mine", "weight": 0.5})
    path.write_text(yaml.safe_dump(sections))
    run = train(path, registry=registry(), rewards={"mine": Redness(RednessConfig(gain=4.0)), "more": Redness()})
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert [(term["name"], term["weight"], term["options"]) for term in saved["rewards"]] == [
        ("mine", 0.5, {"gain": 4.0}),
        ("more", 1.0, {"gain": 1.0}),
    ]
    (first, _) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert first["terms"]["mine"]["weighted"] == pytest.approx(0.5 * first["terms"]["mine"]["raw"])
    assert first["terms"]["mine"]["raw"] == pytest.approx(4 * first["terms"]["more"]["raw"])
    origin = json.loads((run / "environment.json").read_text())["local_rewards"]["mine"]
    assert origin == {"module": "tests.toy_rewards", "class": "Redness"}
    again = {"mine": Redness(RednessConfig(gain=4.0)), "more": Redness()}
    train(run / "config.yaml", ["training.steps=3"], registry=registry(), rewards=again, resume=run)
    with pytest.raises(InvalidConfig, match=r"rewards\.0\.options\.gain: .*there it is 1\.0"):
        train(run / "config.yaml", registry=registry(), rewards={**again, "mine": Redness()}, resume=run)


def test_a_config_without_rewards_takes_the_objects(folder: Path, data: Callable[..., dict[str, Any]]) -> None:
    sections = data()
    del sections["rewards"]
    config = parse(folder, sections, registry=registry().with_rewards({"mine": Redness()}))
    assert [term.name for term in config.rewards] == ["mine"]
    plain = parse(folder, data({"name": "redness"}))
    trainer = Trainer(plain, registry=registry(), rewards={"mine": Redness()})
    assert trainer.mix.labels == ["redness", "mine"]


def test_an_object_can_be_watched_instead(folder: Path, data: Callable[..., dict[str, Any]]) -> None:
    known = registry().with_rewards({"mine": NoGradient()})
    sections = data({"name": "redness"}, evaluation={"rewards": [{"name": "mine"}]})
    assert [term.name for term in parse(folder, sections, registry=known).rewards] == ["redness"]


class Quiet(Redness):
    differentiable = False


class Bare(Reward):
    class Config(RewardConfig):
        size: int = Field(default=3, description="How large.")

    def score(self, batch: Any) -> Any:
        return batch.images.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({"Mine": Redness()}, "snake_case"),
        ({"mine": Redness}, r"Pass an object: Redness\(\)"),
        ({"mine": print}, "must be an object of a subclass of Reward"),
        ({"redness": Redness()}, "toy-rewards offers a reward of that name"),
    ],
)
def test_what_is_no_reward_object_is_refused(rewards: dict[str, Any], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        registry().with_rewards(rewards)


def test_objects_are_checked_like_plugins(folder: Path, data: Callable[..., dict[str, Any]]) -> None:
    known = registry().with_rewards({"quiet": Quiet(), "bare": Bare()})
    terms = [{"name": "quiet"}, {"name": "bare", "options": {"size": 4}}, {"name": "bear", "label": "x"}]
    found = refused(folder, data(*terms), registry=known)
    assert "use it under evaluation.rewards" in found["rewards.0.name"]
    assert "there it is 3" in found["rewards.1.options.size"]
    assert 'Did you mean "bare"' in found["rewards.2.name"]
    assert not known.load_reward("bare").training
