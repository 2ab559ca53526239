"""Going on with a run: what evaluations measured, the code that is trained on and the best LoRA are the run's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from alignprop_core.config.load import resolved_yaml
from alignprop_core.config.sections import GuardsConfig, RunConfig
from alignprop_core.errors import PluginError
from alignprop_core.reward import ImageBatch, Reward
from alignprop_core.training.guards import HeldOutGuard, Subject
from alignprop_core.training.heldout import subject_of
from alignprop_core.training.resume import find_checkpoint
from alignprop_core.training.trainer import Trainer
from tests.support.toy_rewards import registry
from tests.support.toy_runs import adapters, changed, metrics, toy_data

SMALL = {"name": "redness", "label": "small", "options": {"gain": -1.0}}
NEW = "evaluations are not compared with those before the resume"


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Build a config of short runs that evaluate; keyword arguments are overrides, dots as double underscores."""
    evaluation = {"at_end": False, "images_per_prompt": 2, "every": 1, "rewards": [SMALL]}
    base = toy_data(tiny_model, tmp_path, backprop={"strategy": "last_k", "k": 1}, evaluation=evaluation)
    (tmp_path / "prompts.txt").write_text("a fox\ntwo owls\n")
    return lambda **overrides: changed(base, {"training__steps": 2} | overrides, registry())


def train(config: RunConfig, **options: Any) -> Path:
    return Trainer(config, registry=registry(), **options).train()


def standing(folder: Path) -> dict[str, Any]:
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    found: dict[str, Any] = json.loads((newest / "state.json").read_text())["guarding"]["heldout"]
    return found


# -- what the guards go by --------------------------------------------------------------------------------------------


def test_a_resumed_run_that_watches_something_else_starts_its_standing_anew(
    make: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(make())  # it watches the reward, which is positive and rises
    assert standing(folder)["best"] > 0
    first = standing(folder)["first_diversity"]
    assert NEW not in capsys.readouterr().err
    # The other score is its negative: below the best so far whatever happens, and falling.
    options: dict[str, Any] = {"guards": {"watch": "small", "patience": 2, "keep_best": True}, "training__steps": 6}
    train(make(**options), resume=folder)
    said = capsys.readouterr().err
    assert f'{NEW}: guards.watch (was "reward", is "small") changed; the one at step 2 is the first' in said
    assert said.count(NEW) == 1
    assert standing(folder)["best"] < 0
    assert standing(folder)["best_step"] == 2
    assert standing(folder)["first_diversity"] == first, "nothing about it changed"
    assert metrics(folder, "reward")[-1]["step"] == 4, "two evaluations were no better than its own first"
    best = load_file(folder / "lora" / "best" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(best[name], tensor) for name, tensor in adapters(folder).items())
    train(make(**options | {"guards__patience": 3}), resume=folder)
    assert NEW not in capsys.readouterr().err, "said once, and more patience changes nothing of it"
    assert standing(folder)["best_step"] == 2


def test_a_floor_that_is_switched_on_later_goes_by_the_first_diversity_there_is(
    make: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(make(evaluation__images_per_prompt=1))
    assert standing(folder)["first_diversity"] is None
    train(make(guards__diversity_floor=0.01, training__steps=3), resume=folder)
    at = {row["step"]: row["evaluation"]["diversity"] for row in metrics(folder, "evaluation")}
    assert standing(folder)["first_diversity"] == at[2] > 0
    assert "evaluation.images_per_prompt (was 1, is 2) changed; the one at step 2" in capsys.readouterr().err


SCHEDULE = [{"name": "redness", "weight": {0: 1.0, 10: 2.0}}]


@pytest.mark.parametrize(
    ("overrides", "same"),
    [
        ({"training__steps": 9}, True),
        ({"guards": {"patience": 3, "keep_best": True, "drift_limit": 0.5}}, True),
        ({"evaluation__batch_size": 3, "evaluation__every": 4}, True),
        ({"evaluation__rewards": []}, True),
        ({"guards__lower_is_better": True}, False),
        ({"guards__watch": "redness"}, False),
        ({"evaluation__seed": 3}, False),
        ({"evaluation__images_per_prompt": 3}, False),
        ({"evaluation__diversity_encoder": "small"}, False),
    ],
)
def test_what_is_measured_is_known_by_what_it_depends_on(
    make: Callable[..., RunConfig], overrides: dict[str, Any], same: bool
) -> None:
    one, two = (subject_of(Trainer(make(**options), registry=registry())) for options in ({}, overrides))
    assert (one == two) is same


def test_a_total_is_known_by_its_last_weights_a_score_by_its_options_and_prompts_by_their_text(
    make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    def subject(**overrides: Any) -> Subject:
        return subject_of(Trainer(make(**overrides), registry=registry()))

    assert subject(rewards=SCHEDULE) != subject(rewards=SCHEDULE, training__steps=9)
    assert subject(rewards=SCHEDULE, training__steps=10) == subject(rewards=SCHEDULE, training__steps=20)
    watched = {"guards__watch": "small"}
    assert subject(**watched) != subject(**watched, evaluation__rewards=[SMALL | {"options": {"gain": 3.0}}])
    file = tmp_path / "mine.py"
    file.write_text(SOURCE)
    watched |= {"evaluation__rewards": [{"name": f"{file}:Mine", "label": "small"}]}
    before = subject(**watched)
    assert subject(**watched) == before
    file.write_text(SOURCE + "# edited\n")
    assert subject(**watched) != before
    before = subject()
    (tmp_path / "prompts.txt").write_text("a fox\nthree owls\n")
    assert subject() != before


def subject(**parts: Any) -> Subject:
    usual = {"evaluation.seed": 1}, {"evaluation.diversity_encoder": None}, {"guards.watch": "a"}
    return replace(Subject(*usual), **parts)


def judged(config: GuardsConfig) -> HeldOutGuard:
    guard = HeldOutGuard(config)
    assert guard.measures(subject()) is None
    for step, score in enumerate((1.0, 5.0, 4.0)):
        guard.judge(step, score, 0.1 * step, 0.4 - 0.1 * step)
    return guard


def resumed(guard: HeldOutGuard, config: GuardsConfig | None = None) -> HeldOutGuard:
    again = HeldOutGuard(config or guard.config)
    again.load(json.loads(json.dumps(guard.as_json())))
    return again


def test_what_still_can_be_compared_is_kept_and_nothing_else() -> None:
    guard = judged(GuardsConfig())
    again = resumed(guard)
    assert again.measures(subject()) is None
    assert again.as_json() == guard.as_json()

    again = resumed(guard)
    assert again.measures(subject(pictures={"evaluation.seed": 2})) == "evaluation.seed (was 1, is 2) changed"
    assert (again.standing.best, again.standing.step, again.standing.first_diversity) == (None, None, None)

    again = resumed(guard)
    assert again.measures(subject(watched={"guards.watch": "b"})) == 'guards.watch (was "a", is "b") changed'
    assert (again.standing.best, again.standing.step, again.standing.first_diversity) == (None, None, 0.4)

    again, both = resumed(guard), {"pictures": {"evaluation.seed": 2}, "watched": {"guards.watch": "b"}}
    assert (
        again.measures(subject(**both))
        == 'evaluation.seed (was 1, is 2) changed and guards.watch (was "a", is "b") changed'
    )

    encoder = subject(diversity={"evaluation.diversity_encoder": "clip"})
    again = resumed(guard)
    assert again.measures(encoder) is None, "no guard goes by it"
    assert (again.standing.best, again.standing.first_diversity) == (5.0, None)
    assert not again.judge(3, 4.5, 0.1, 30.0)
    floored = resumed(again, GuardsConfig(diversity_floor=0.5))
    assert floored.measures(encoder) is None
    assert floored.standing.first_diversity == 30.0
    floored = resumed(guard, GuardsConfig(diversity_floor=0.5))
    assert floored.measures(encoder) == 'evaluation.diversity_encoder (was null, is "clip") changed'
    assert (floored.standing.best, floored.standing.first_diversity) == (None, None)

    state = {key: value for key, value in guard.as_json().items() if key != "subject"}
    again = HeldOutGuard(GuardsConfig())
    again.load(state)
    assert again.measures(subject()) == "the checkpoint does not say what was measured"
    assert again.standing.best is None


def test_a_best_outside_the_limits_of_a_resumed_run_is_none() -> None:
    again = resumed(judged(GuardsConfig()), GuardsConfig(drift_limit=0.05))
    assert again.measures(subject()) == "at the best, of step 1, drift 0.1 is above guards.drift_limit 0.05"
    assert again.standing.best is None
    again = resumed(judged(GuardsConfig()), GuardsConfig(diversity_floor=0.7))
    assert again.measures(subject()) is None, "0.3 is more than 0.7 of 0.4"
    assert again.standing.best == 5.0
    assert again.stop_reason() == "diversity 0.2 is below guards.diversity_floor 0.7 of its first, 0.4"


def test_no_old_best_is_left_where_none_counts(
    make: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(make())
    assert (folder / "lora" / "best").is_dir()
    train(make(guards={"drift_limit": 1e-9, "keep_best": True}, training__steps=3), resume=folder)
    said = capsys.readouterr().err
    assert f"{NEW}: at the best, of step 2, drift" in said
    assert "no evaluation was within the limits of guards; the LoRA is that of the last step" in said
    assert not (folder / "lora" / "best").exists()


# -- the best LoRA ----------------------------------------------------------------------------------------------------


def test_the_best_lora_comes_along_into_another_folder(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    guards = {"watch": "small"}  # it falls, so the start stays the best
    folder = train(make(guards=guards))
    other = train(make(guards=guards, training__steps=3, output=str(tmp_path / "other")), resume=folder)
    name = "lora/best/pytorch_lora_weights.safetensors"
    ours, theirs = load_file(other / name), load_file(folder / name)
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    assert (other / "lora" / "best" / "other.safetensors").is_file()
    with safe_open(other / name, framework="pt") as file:
        assert file.metadata()["alignprop.step"] == "0"
    straight = train(make(guards=guards, training__steps=3, output=str(tmp_path / "straight")))
    assert all(torch.equal(adapters(other)[key], tensor) for key, tensor in adapters(straight).items())


# -- the code that is trained on --------------------------------------------------------------------------------------

SOURCE = '''
from alignprop_core import Reward


class Mine(Reward):
    """For tests."""

    def score(self, batch):
        return batch.images.mean((1, 2, 3))
'''


def test_a_reward_file_that_was_edited_is_refused_until_it_is_put_back(
    make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(SOURCE)
    options: dict[str, Any] = {"rewards": [{"name": f"{file}:Mine"}], "evaluation__every": None}
    folder = train(make(**options, training__steps=1))
    file.write_text(SOURCE.replace("mean", "amax"))
    with pytest.raises(PluginError, match=r"rewards\.0\.name: .*mine\.py was changed since .*Put it back") as caught:
        train(make(**options), resume=folder)
    assert caught.value.exit_code == 2
    with pytest.raises(PluginError, match="was changed"):
        train(make(**options, output=str(tmp_path / "other")), resume=folder / "checkpoints" / "step-000001")
    file.write_text(SOURCE)
    train(make(**options, training__steps=2), resume=folder)
    assert metrics(folder, "reward")[-1]["step"] == 2
    file.write_text(SOURCE.replace("mean", "amin"))
    with pytest.raises(PluginError, match="was changed"):
        Trainer(make(**options, training__steps=3), registry=registry(), resume=folder)
    mended = Trainer(make(**options, training__steps=3), registry=registry(), resume=folder, edited=True)
    assert mended.step_number == 2


def test_an_edited_file_of_an_isolated_reward_is_refused(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    file, folder = tmp_path / "mine.py", tmp_path / "run"
    file.write_text(SOURCE)
    checkpoint = folder / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    plain = make().model_dump(mode="json")
    term = {"name": f"{file}:Mine", "label": "mine", "isolation": {"python": "/envs/mine/bin/python"}}
    config = RunConfig.model_validate(plain | {"rewards": [term]})
    (folder / "config.yaml").write_text(resolved_yaml(config))
    origin = {"file": str(file), "sha256": "0" * 64, "class": "Mine"}
    (folder / "environment.json").write_text(json.dumps({"isolated_rewards": {"mine": {"from": origin}}}))
    with pytest.raises(PluginError, match=r"rewards\.0\.name: .*mine\.py was changed"):
        find_checkpoint(folder, config)


class Mine(Reward):
    def score(self, batch: ImageBatch) -> Tensor:
        return batch.images.mean((1, 2, 3))


class Edited(Reward):
    def score(self, batch: ImageBatch) -> Tensor:
        return -batch.images.mean((1, 2, 3))


def test_an_object_of_another_class_is_refused(make: Callable[..., RunConfig]) -> None:
    data = make(evaluation__every=None, rewards=[SMALL], evaluation__rewards=[])
    folder = train(data, rewards={"mine": Mine()})
    longer = make(evaluation__every=None, rewards=[SMALL], evaluation__rewards=[], training__steps=3)
    with pytest.raises(PluginError, match=r'rewards\.1: the class Edited of the object "mine" was changed since'):
        train(longer, rewards={"mine": Edited()}, resume=folder)
    train(longer, rewards={"mine": Mine()}, resume=folder)
    assert metrics(folder, "reward")[-1]["step"] == 3
