"""Rewards from Python and from a file: no packaging, the same checks and logs, and nothing run that was not named."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from functools import partial
from html import unescape
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from pydantic import Field

from alignprop_core import train
from alignprop_core.config.advice import score_advice
from alignprop_core.config.load import load_config
from alignprop_core.config.rewards import RewardTerm
from alignprop_core.config.sections import RunConfig
from alignprop_core.config.yaml import dump_yaml
from alignprop_core.errors import ConfigError, PluginError, RewardError, TrialError
from alignprop_core.mix.load import load_terms
from alignprop_core.registry.function import FunctionReward
from alignprop_core.registry.local import from_file, public_name
from alignprop_core.reward import ImageBatch, Reward
from alignprop_core.specs import RewardConfig
from alignprop_core.training.trainer import Trainer
from alignprop_core.training.trial import try_alone
from alignprop_core.validation import InvalidConfig
from tests.support.toy_rewards import NoGradient, Redness, RednessConfig, registry

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


FACTOR = 2.0


def brightness(images, prompts, metadata):
    """Bright images."""
    assert len(images) == len(prompts) == len(metadata)
    return FACTOR * mean(images), {"info": 1}


def mean(x):
    return x.mean((1, 2, 3))


def four(images, prompts, metadata, scale):
    return mean(images)
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
            "previews": {"prompts": []},
            "evaluation": {"images_per_prompt": 1, **more.pop("evaluation", {})},
            "output": str(folder / "run"),
            **more,
        }

    return build


def parse(folder: Path, data: dict[str, Any], **options: Any) -> RunConfig:
    (folder / "run.yaml").write_text(dump_yaml(data))
    return load_config(folder / "run.yaml", registry=options.pop("registry", registry()), **options)


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


def test_a_function_in_a_file_trains_and_is_checked_like_a_class(
    folder: Path, data: Callable[..., dict[str, Any]]
) -> None:
    config = parse(folder, data({"name": "./my_rewards.py:brightness"}))
    run = train(config, registry=registry())
    (first, _) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert 0 < first["terms"]["brightness"]["raw"] < 2
    origin = json.loads((run / "environment.json").read_text())["local_rewards"][config.rewards[0].name]
    assert origin["function"] == "brightness"
    assert len(origin["sha256"]) == 64
    found = refused(folder, data({"name": "./my_rewards.py:brightness", "options": {"gain": 1}}))
    assert found["rewards.0.options.gain"].startswith("unknown key")


def test_a_function_takes_what_its_signature_says() -> None:
    images = torch.rand(2, 3, 4, 4)
    batch = ImageBatch(images=images, prompts=["a", "b"], metadata=[{"n": 1}, {"n": 2}])
    seen: list[Any] = []

    def scores(*given: Any) -> torch.Tensor:
        seen.append(given[1:])
        return given[0].mean((1, 2, 3))

    class Scorer(torch.nn.Module):
        def forward(self, images: Any, prompts: Any) -> Any:
            return scores(images, prompts)

    functions = [
        lambda images: scores(images),
        lambda images, prompts: scores(images, prompts),
        lambda images, prompts, metadata: (scores(images, prompts, metadata), {}),
        lambda images, gain=2.0: scores(images),
        lambda images, prompts=None, metadata=None: scores(images, prompts, metadata),
        scores,
        partial(scores),
        Scorer(),
    ]
    for function in functions:
        assert FunctionReward(function)(batch).shape == (2,)
    texts, metadata = ["a", "b"], [{"n": 1}, {"n": 2}]
    both = (texts, metadata)
    assert seen == [(), (texts,), both, (), both, both, both, (texts,)]


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
        ("./my_rewards.py:Zebra", ["its rewards are MyRedness, Plain, Detached, Measure, brightness, four."]),
        ("./my_rewards.py:", ["class or function named after the colon"]),
        ("./my_rewards.py:NoReward", ["not a function or a subclass of"]),
        ("./my_rewards.py:Reward", ["not a function or a subclass of"]),
        ("./my_rewards.py:FACTOR", ["not a function or a subclass of"]),
        (
            "./my_rewards.py:four",
            ["the function takes (images, prompts, metadata, scale); it must take (images), (images,"],
        ),
        ("./broken.py:Plain", ["broken.py", "ZeroDivisionError"]),
        ("./leaves.py:Plain", ["leaves.py", "sys.exit"]),
        ("./my_rewards.py:Measure", ["no gradient", "use it under evaluation.rewards"]),
        ("./my_rewards.py", ["add the name of a function or class: ./my_rewards.py:NAME."]),
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


def test_a_file_without_a_gradient_is_refused_before_training(
    folder: Path, data: Callable[..., dict[str, Any]]
) -> None:
    config = parse(folder, data({"name": "./my_rewards.py:Detached"}))
    words = r'^rewards\.0\.name: .*"detached" returned scores without.*use it under evaluation\.rewards'
    with pytest.raises(TrialError, match=words):
        Trainer(config, registry=registry())
    with pytest.raises(TrialError, match=r'^rewards\.1\.name: .*"mine" returned scores without a gradient'):
        Trainer(parse(folder, data({"name": "redness"})), registry=registry(), rewards={"mine": NoGradient()})


@pytest.mark.parametrize("kind", ["Detached", "Measure"])
def test_a_class_without_gradient_has_key_and_line_whether_it_says_so_or_not(
    folder: Path, data: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    import yaml

    from alignprop_core.cli import run

    path = folder / "run.yaml"
    # A plugin whose name no installed one has would be refused first.
    path.write_text(yaml.safe_dump(data({"name": f"./my_rewards.py:{kind}"}), sort_keys=False))
    (line,) = (i for i, text in enumerate(path.read_text().splitlines(), 1) if kind in text)
    assert run(["train", str(path)]) == 2
    assert f"error: {path}:{line}: rewards.0.name: " in capsys.readouterr().err


PICKY = """
import torch.nn.functional as F
from alignprop_core import Reward


class Large(Reward):
    def score(self, batch):
        self.seen = (tuple(batch.images.shape), str(batch.images.dtype))
        return F.unfold(batch.images, 100).mean((1, 2))


class Broken(Reward):
    def score(self, batch):
        return helps(batch.images)


def helps(images):
    return images.mean((1, 2, 3)).reshape(7, 7)
"""


def trial(folder: Path, data: dict[str, Any]) -> None:
    """Score an image of noise, beside another one."""
    (term,) = load_terms(parse(folder, data).rewards, registry())
    images = torch.rand(1, 3, 104, 136, generator=torch.Generator().manual_seed(1))
    try_alone(term, ImageBatch(images=images, prompts=["a fox"], metadata=[{}]))


def test_the_trial_finds_a_score_that_depends_on_the_other_images(
    folder: Path, data: Callable[..., dict[str, Any]]
) -> None:
    (folder / "mixing.py").write_text(
        "def batch_mean(images): return images.mean().expand(len(images))\n"
        "def ranked(images): return images.mean((1, 2, 3)) - images.mean()\n"
        "def own(images): return images.mean((1, 2, 3)) - 0.5\n"
    )
    for name in ("batch_mean", "ranked"):
        with pytest.raises(RewardError, match=f'"{name}": the score of an image depends on the other images'):
            trial(folder, data({"name": f"./mixing.py:{name}"}))
    trial(folder, data({"name": "./mixing.py:own"}))


def test_the_trainer_tries_at_the_size_it_draws(folder: Path, data: Callable[..., dict[str, Any]]) -> None:
    (folder / "picky.py").write_text(PICKY)
    sections = data({"name": "./picky.py:Large"}, sampling={"steps": 1, "width": 136, "height": 104})
    trainer = Trainer(parse(folder, sections), registry=registry())
    assert trainer.mix.terms[0].reward.seen == ((2, 3, 104, 136), "torch.float32")
    with pytest.raises(TrialError, match="of 96x104 pixels"):
        Trainer(parse(folder, {**sections, "sampling": {"width": 96, "height": 104}}), registry=registry())


def test_a_reward_that_raises_says_where_in_its_own_code(folder: Path, data: Callable[..., dict[str, Any]]) -> None:
    (folder / "picky.py").write_text(PICKY)
    line = PICKY.splitlines().index("    return images.mean((1, 2, 3)).reshape(7, 7)") + 1
    with pytest.raises(RewardError) as caught:
        trial(folder, data({"name": "./picky.py:Broken"}))
    assert f" ({folder / 'picky.py'}:{line}, in helps)" in str(caught.value)
    (folder / "inside.py").write_text(PICKY.replace("100).mean((1, 2))", "100, nonsense=1)"))
    with pytest.raises(RewardError, match=r"inside\.py:9, in score\)"):  # raised in torch's own code or at its door
        trial(folder, data({"name": "./inside.py:Large"}))


def test_advice_to_score_names_the_reward_and_not_its_label(
    folder: Path,
    data: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from PIL import Image

    from alignprop_core.cli import run

    known = registry().with_rewards({"mine": Redness()})
    plugin = RewardTerm(name="redness", label="r", options={"gain": 1.0})
    assert score_advice(plugin, known) == "with `alignprop score IMAGE --reward redness`"
    isolated = RewardTerm.model_validate({"name": "far", "isolation": {"python": "/envs/far/bin/python"}})
    assert score_advice(RewardTerm(name="mine"), known) == score_advice(isolated, known) == ""
    terms = {"name": "./my_rewards.py:MyRedness", "label": "m", "options": {"gain": 3.0, "channels": [1, 2]}}
    (entry,) = parse(folder, data(terms)).rewards
    advice = score_advice(entry, known)
    assert f"IMAGE --reward {folder / 'my_rewards.py'}:MyRedness -o gain=3.0 -o 'channels=[1, 2]'`" in advice
    Image.new("RGB", (64, 64), (0, 255, 0)).save(folder / "green.png")
    command = advice.removeprefix("with `alignprop ").removesuffix("`").replace("IMAGE", str(folder / "green.png"))
    monkeypatch.chdir("/")
    assert run(shlex.split(command)) == 0
    assert "1.5" in capsys.readouterr().out, "3 times the mean of green and blue"


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
    assert origin == {"module": "tests.support.toy_rewards", "class": "Redness"}
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
    assert list(trainer.mix.labels) == ["redness", "mine"]


def test_a_config_made_in_python_needs_no_rewards_beside_objects(
    folder: Path, data: Callable[..., dict[str, Any]]
) -> None:
    sections = {key: value for key, value in parse(folder, data({"name": "redness"})) if key != "rewards"}
    config = RunConfig(**sections)
    assert train(config, registry=registry(), rewards={"mine": Redness()}).folder.is_dir()
    with pytest.raises(ConfigError, match=r"^rewards: there is nothing to train on.*pass an object"):
        Trainer(config, registry=registry())
    assert refused(folder, {**data(), "rewards": []}).keys() == {"rewards"}
    missing = data()
    del missing["rewards"]
    assert refused(folder, missing) == {"rewards": "is required."}
    schema = RunConfig.model_json_schema()
    assert "rewards" in schema["required"]
    assert "default" not in schema["properties"]["rewards"]


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
        ({"mine": int}, r'^rewards\["mine"\]: must be a function, or a class or object of .*, not the class int'),
        ({"mine": 3}, "must be a function, or a class or object of .*, not of type int"),
        ({"mine": lambda images, prompts, metadata, scale: images}, "it must take"),
        ({"mine": lambda *, images: images}, "it must take"),
        ({"mine": lambda: 0}, "it must take"),
        ({"redness": Redness()}, 'toy-rewards offers a reward of the name "redness"'),
    ],
)
def test_what_is_not_a_reward_is_refused(rewards: dict[str, Any], message: str) -> None:
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


def test_a_run_on_objects_says_at_the_command_line_what_to_do(
    folder: Path, data: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    from alignprop_core.cli import run as command
    from alignprop_report.run_files import read_run
    from alignprop_report.run_page import run_page

    (folder / "run.yaml").write_text(yaml.safe_dump({**data(), "rewards": [{"name": "mine"}]}))
    made = train(folder / "run.yaml", registry=registry(), rewards={"mine": Redness()})
    words = [
        'rewards.0.name: "mine" was an object passed from Python (class Redness of module tests.support.toy_rewards)',
        f'alignprop_core.train("{made / "config.yaml"}", rewards={{"mine": ...}})',
        f'resume=Path("{made}")',
        "./my_rewards.py:Redness",
    ]
    for arguments in (["evaluate", str(made)], ["train", str(made / "config.yaml"), "--resume", "latest"]):
        assert command(arguments) == 2
        message = capsys.readouterr().err
        for word in words:
            assert word in message
        assert "No installed plugin" not in message

    page = unescape(run_page(read_run(made)))
    assert "--resume" not in page
    (code,) = re.findall(r"import alignprop_core\n.*?resume=run\)", page, re.DOTALL)
    assert 'train(run / "config.yaml", ["training.steps=4"], rewards={"mine": ...}, resume=run)' in code
    # What the page says works, with the object in place of the dots.
    exec(code.replace("...", "Redness()"), {"Path": Path, "Redness": Redness})
    assert len((made / "metrics.jsonl").read_text().splitlines()) == 4
    # And so does what the message says of evaluating.
    text = (made / "config.yaml").read_text()
    (made / "config.yaml").write_text(text.replace("name: mine", "name: ../my_rewards.py:MyRedness", 1))
    assert command(["evaluate", str(made), "--images-per-prompt", "1"]) == 0
    assert "mine" in capsys.readouterr().out, "the label stays"
