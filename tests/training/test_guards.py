"""Guards: bad steps are dropped and said, the best LoRA is kept, a run that has gone far enough stops by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import alignprop_report
from alignprop_core import lora
from alignprop_core.config.sections import GuardsConfig, RunConfig
from alignprop_core.errors import ConfigError, RewardError, RunError
from alignprop_core.hookspecs import hookimpl
from alignprop_core.mix.stats import StepStats
from alignprop_core.registry.registry import Registry
from alignprop_core.reward import ImageBatch
from alignprop_core.specs import RewardSpec
from alignprop_core.training.callback import Callback
from alignprop_core.training.ema import Average
from alignprop_core.training.guards import HeldOutGuard, StepGuard
from alignprop_core.training.measures import Measures
from alignprop_core.training.trainer import Trainer
from tests.support import ROOT, toy_rewards
from tests.support.toy_rewards import NotANumber, Redness
from tests.support.toy_runs import Interrupt, adapters, changed, metrics, toy_data


class Moody(Redness):
    """Redness, but for the training batches (of four) whose numbers are listed: there its gradient is multiplied."""

    factors: dict[int, float] = {}  # noqa: RUF012
    calls = 0

    def score(self, batch: ImageBatch) -> Tensor:
        score = super().score(batch)
        if batch.images.requires_grad:
            Moody.calls += 1
            factor = Moody.factors.get(Moody.calls, 1.0)
            score.register_hook(lambda gradient: gradient * factor)
        return score


class Plugin:
    @hookimpl
    def alignprop_register_rewards(self) -> list[RewardSpec]:
        return [
            RewardSpec(
                name="moody",
                summary="For tests.",
                factory="tests.test_guards:Moody",
                config="tests.support.toy_rewards:RednessConfig",
            )
        ]


def registry() -> Registry:
    toys = SimpleNamespace(alignprop_register_rewards=toy_rewards.alignprop_register_rewards)
    return Registry.from_plugins({"toy-rewards": toys, "guards": Plugin(), "alignprop-report": alignprop_report})


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Build a config; keyword arguments are overrides with dots written as double underscores."""
    base = toy_data(tiny_model, tmp_path, backprop={"strategy": "last_k", "k": 1})
    (tmp_path / "prompts.txt").write_text("a fox\ntwo owls\n")
    return lambda **overrides: changed(base, overrides, registry())


def train(config: RunConfig, **options: Any) -> Path:
    return Trainer(config, registry=registry(), **options).train()


# -- steps that are dropped -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "why"), [(float("nan"), "not finite"), (1e9, "times the usual")])
def test_a_bad_step_is_dropped_and_the_run_goes_on(
    make: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str], factor: float, why: str
) -> None:
    class Watch(Callback):
        states: list[dict[str, Tensor]] = []  # noqa: RUF012

        def on_step(self, trainer: Trainer, stats: StepStats) -> None:
            self.states.append(lora.state(trainer.denoiser))

    Watch.states.clear()
    Moody.calls, Moody.factors = 0, {10: factor}
    terms = [{"name": "redness"}, {"name": "moody"}]
    folder = train(make(rewards=terms, training__steps=12), callbacks=[Watch()])
    rows = metrics(folder, "reward")
    assert [row["step"] for row in rows if row["dropped"]] == [10]
    assert why in rows[9]["dropped"]
    assert '"moody"' in rows[9]["dropped"]
    assert '"redness"' not in rows[9]["dropped"]
    assert "step 10 dropped: " in capsys.readouterr().err
    before, at, after = Watch.states[8:11]
    assert all(torch.equal(at[name], before[name]) for name in before)
    assert any(not torch.equal(after[name], at[name]) for name in before)


def test_repeated_bad_steps_stop_the_run_with_the_last_good_state(make: Callable[..., RunConfig]) -> None:
    Moody.calls, Moody.factors = 0, {n: float("nan") for n in range(4, 99)}
    config = make(rewards=[{"name": "moody"}], guards__max_dropped_steps=2)
    with pytest.raises(RunError, match=r'Step 5: the gradient is not finite.*"moody".* the 1 before it were dropped'):
        train(config)
    folder = Path(config.output)
    assert [bool(row["dropped"]) for row in metrics(folder, "reward")] == [False] * 3 + [True] * 2
    kept = load_file(folder / "checkpoints" / "step-000005" / "adapter.safetensors")
    Moody.calls, Moody.factors = 0, {}
    good = make(rewards=[{"name": "moody"}], training__steps=3, output=str(folder.parent / "good"))
    expected = load_file(train(good) / "checkpoints" / "step-000003" / "adapter.safetensors")
    assert all(torch.equal(kept[name], expected[name]) for name in expected)
    Moody.calls, Moody.factors = 0, {}
    train(config, resume=folder)
    assert [row["step"] for row in metrics(folder, "reward")] == [1, 2, 3, 4, 5, 6]


def test_a_score_that_is_not_finite_names_its_reward_when_it_stays_so(make: Callable[..., RunConfig]) -> None:
    with pytest.raises(RewardError, match=r'Step 1: reward "not_a_number" gave a score that is not finite'):
        train(make(rewards=[{"name": "not_a_number"}], guards__max_dropped_steps=1))


@pytest.mark.parametrize("given", [False, True])
def test_the_advice_for_a_bad_score_is_a_command_that_works(tiny_model: Path, tmp_path: Path, given: bool) -> None:
    """Of the reward's name and not of its label; and none for an object, which no command can find."""
    rewards = [{"name": "mine"} if given else {"name": "not_a_number", "label": "odd"}]
    known = toy_rewards.registry().with_rewards({"mine": NotANumber()} if given else {})
    config = changed(toy_data(tiny_model, tmp_path, rewards=rewards), {"guards__max_dropped_steps": 1}, known)
    with pytest.raises(RewardError) as caught:
        Trainer(config, registry=known).train()
    assert ("--reward not_a_number" in str(caught.value)) is not given
    assert ("alignprop score" in str(caught.value)) is not given


def test_a_run_without_one_good_step_fails(make: Callable[..., RunConfig]) -> None:
    with pytest.raises(RewardError, match=r"Step 2: .*This step and the 1 before it were dropped"):
        train(make(rewards=[{"name": "not_a_number"}], training__steps=2))


def test_explosion_is_judged_against_the_usual_norm_and_not_before_there_is_one() -> None:
    guard = StepGuard(GuardsConfig(explosion=10.0))

    def judge(step: int, norm: float) -> str | None:
        return guard.judge(step, {"a": 0.0}, norm, overflow_expected=False)

    assert judge(1, 1e6) is None, "nothing is usual yet"
    assert all(judge(step, 0.0) is None for step in range(2, 20)), "steps at a ceiling say nothing of what is usual"
    assert all(judge(step, 1.0) is None for step in range(20, 28))
    assert judge(28, 9.0) is None
    assert judge(29, 11.0) is not None
    assert StepGuard(GuardsConfig(explosion=None)).judge(1, {}, 1e30, overflow_expected=False) is None
    assert guard.judge(30, {"a": 0.0}, float("inf"), overflow_expected=True) is None, "float16 finding its scale"
    again = StepGuard(GuardsConfig(explosion=10.0))
    again.load(json.loads(json.dumps(guard.as_json())))
    assert again.as_json() == guard.as_json()


def test_a_bad_gradient_is_laid_to_the_terms_that_have_it() -> None:
    guard = StepGuard(GuardsConfig(explosion=10.0, max_dropped_steps=1))

    def message(norm: float, **terms: float) -> str:
        assert guard.judge(20, {"a": 0.0}, norm, overflow_expected=False, terms=terms) is not None
        with pytest.raises(RunError) as caught:
            guard.check()
        return str(caught.value)

    for step in range(10):
        guard.judge(step, {"a": 0.0}, 1.0, overflow_expected=False, terms={"a": 2.0, "b": 3.0})
    nan = float("nan")
    assert 'that of "b", at the images already' in message(nan, a=2.0, b=nan)
    assert 'that of "a" and "b", at' in message(nan, a=float("inf"), b=nan)
    told = message(nan, a=2.0, b=3.0)
    assert "so are the gradients of all rewards at the images" in told
    assert "infinite slope" not in told
    assert 'where 1 is usual (at the images: "b" 50 times).' in message(100.0, a=2.0, b=150.0)
    assert "where 1 is usual. " in message(100.0, a=2.0, b=3.0), "it grew behind the images"
    again = StepGuard(guard.config)
    again.load(json.loads(json.dumps(guard.as_json())))
    assert again.terms == {"a": [2.0] * 10, "b": [3.0] * 10}


# -- held-out scores --------------------------------------------------------------------------------------------------


def test_patience_counts_evaluations_without_a_new_best() -> None:
    guard = HeldOutGuard(GuardsConfig(patience=2))
    for step, score, best in ((0, 1.0, True), (5, 2.0, True), (10, 1.9, False)):
        assert guard.judge(step, score, 0.0, None) is best
        assert guard.stop_reason() is None
    assert not guard.judge(15, float("nan"), 0.0, None), "what is not a number is never the best"
    assert guard.stop_reason() == "held-out reward was no better at 2 evaluations in a row (best 2 at step 5)"
    assert guard.judge(20, 3.0, 0.0, None)
    assert guard.stop_reason() is None


def test_limits_stop_a_run_and_bar_an_evaluation_from_being_the_best() -> None:
    guard = HeldOutGuard(GuardsConfig(drift_limit=0.2, diversity_floor=0.5, lower_is_better=True))
    assert guard.judge(0, 5.0, 0.0, 0.4)
    assert guard.judge(1, 4.0, 0.2, 0.3)
    assert not guard.judge(2, 3.0, 0.21, 0.3)
    assert guard.stop_reason() == "drift 0.21 is above guards.drift_limit 0.2"
    assert not guard.judge(3, 3.0, 0.1, 0.19)
    assert guard.stop_reason() == "diversity 0.19 is below guards.diversity_floor 0.5 of its first, 0.4"
    assert guard.standing.best_step == 1


def test_evaluations_are_lines_of_metrics_with_the_same_seeds(make: Callable[..., RunConfig]) -> None:
    seen = []

    class Watch(Callback):
        def on_evaluation(self, trainer: Trainer, figures: Any) -> None:
            seen.append((trainer.step_number, figures["reward"]))

    folder = train(make(evaluation__every=4), callbacks=[Watch()])
    rows = metrics(folder, "evaluation")
    assert [row["step"] for row in rows] == [0, 4, 6], "before the first step, on the way, after the last"
    assert seen == [(row["step"], row["evaluation"]["reward"]) for row in rows]
    first, last = rows[0]["evaluation"], rows[-1]["evaluation"]
    assert first["drift"] == 0
    assert last["drift"] > 0
    assert last["scores"]["redness"]["mean"] > first["scores"]["redness"]["mean"]
    assert last["scores"]["red_share"]["mean"] == pytest.approx(last["reward"], abs=1e-6)
    assert first["diversity"] > 0
    assert [row["step"] for row in metrics(folder, "terms")] == [1, 2, 3, 4, 5, 6], "the steps' own lines are as before"


def test_the_run_stops_by_itself_and_keeps_the_best(
    make: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    # Trained for more red, watched for less: the start stays the best, and the second evaluation is one too many.
    config = make(
        training__steps=50,
        evaluation__every=2,
        evaluation__at_end=True,
        guards={"watch": "red_share", "lower_is_better": True, "patience": 2, "keep_best": True},
    )
    folder = train(config)
    assert [row["step"] for row in metrics(folder, "reward")][-1] == 4
    told = json.loads((folder / "evaluation.json").read_text())
    assert told["step"] == 0
    assert "no better at 2 evaluations in a row" in told["stopped"]
    assert told["drift"]["tuned"] == 0
    assert told["diversity"]["base"]["mean"] == told["diversity"]["tuned"]["mean"]
    assert all(not tensor.any() for name, tensor in adapters(folder).items() if "lora_B" in name)
    said = capsys.readouterr().err
    assert "stopped at step 4: held-out red_share was no better" in said
    assert "the run's LoRA is the best one, of step 0" in said


def test_the_best_lora_is_kept_beside_the_last_and_is_what_was_evaluated(
    make: Callable[..., RunConfig], tmp_path: Path
) -> None:
    # The best lies in the middle: after step 4 the learning rate of this run makes nothing better.
    config = make(training__steps=4, evaluation__every=2, guards={"drift_limit": 1e-9})
    folder = train(config)
    best = load_file(folder / "lora" / "best" / "pytorch_lora_weights.safetensors")
    assert all(not tensor.any() for name, tensor in best.items() if "lora_B" in name), "only the start had no drift"
    assert any(tensor.any() for name, tensor in adapters(folder).items() if "lora_B" in name)
    assert metrics(folder, "reward")[-1]["step"] == 2
    again = make(training__steps=4, evaluation__every=2, output=str(tmp_path / "again"))
    free = train(again)
    best = load_file(free / "lora" / "best" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(best[name], tensor) for name, tensor in adapters(free).items()), "red rose to the end"


def test_a_guarded_run_resumes_as_the_run(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "evaluation__every": 2,
        "evaluation__at_end": True,
        "optimizer__ema_decay": 0.9,
        "regularization__weight": 0.1,
        "guards": {"patience": 3, "keep_best": True},
    }
    straight = train(make(**options))
    config = make(**options, output=str(tmp_path / "broken"))
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Interrupt(3)])
    resumed = train(config, resume=tmp_path / "broken")
    for name, tensor in adapters(straight).items():
        assert torch.equal(adapters(resumed)[name], tensor), name
    for key in ("evaluation", "reward"):
        ours, theirs = (
            [{k: v for k, v in row.items() if k not in ("seconds", "peak_memory")} for row in metrics(folder, key)]
            for folder in (resumed, straight)
        )
        assert ours == theirs
    one, two = (json.loads((folder / "evaluation.json").read_text()) for folder in (straight, resumed))
    assert one == two


def test_an_evaluation_that_was_interrupted_is_made_up_for(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    straight = train(make(evaluation__every=2))
    config = make(evaluation__every=2, output=str(tmp_path / "broken"))
    trainer = Trainer(config, registry=registry())

    def interrupt(*_: object) -> None:
        if trainer.step_number == 4:
            raise KeyboardInterrupt

    trainer.denoiser.register_forward_pre_hook(lambda *_: None if torch.is_grad_enabled() else interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    folder = train(config, resume=tmp_path / "broken")
    assert metrics(folder, "evaluation") == metrics(straight, "evaluation")


def test_a_stopped_run_stays_stopped_until_its_guards_allow_more(make: Callable[..., RunConfig]) -> None:
    options: dict[str, Any] = {"evaluation__every": 2, "training__steps": 8}
    folder = train(make(**options, guards={"drift_limit": 1e-9}))
    assert metrics(folder, "reward")[-1]["step"] == 2
    lines = metrics(folder)
    assert lines[-1] == {"step": 2, "stopped": lines[-1]["stopped"]}
    assert lines[-1]["stopped"].endswith("is above guards.drift_limit 1e-09")
    told = f"Stopped early at step 2 of 8: {lines[-1]['stopped']}."
    assert told in (folder / "report.html").read_text(), "there is no evaluation.json to say it"
    train(make(**options, guards={"drift_limit": 1e-9}), resume=folder)
    assert metrics(folder, "reward")[-1]["step"] == 2
    assert metrics(folder, "stopped") == lines[-1:], "said once"
    train(make(**options), resume=folder)
    assert metrics(folder, "reward")[-1]["step"] == 8
    assert metrics(folder, "stopped") == [], "it went on to its end"
    assert "Finished after 8 steps." in (folder / "report.html").read_text()
    assert [row["step"] for row in metrics(folder, "evaluation")] == [0, 2, 4, 6, 8]


# -- the average, weight decay, regularization ------------------------------------------------------------------------


def test_the_average_follows_its_formula() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = Average([parameter], decay=0.5)
    expected = torch.zeros(3)
    for n in range(6):
        with torch.no_grad():
            parameter += 1
        average.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * parameter.detach()
    torch.testing.assert_close(average.values[0], expected)
    with average.swapped_in():
        torch.testing.assert_close(parameter.detach(), expected)
    assert torch.equal(parameter.detach(), torch.full((3,), 6.0))


def test_saved_and_evaluated_is_the_average(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    class Watch(Callback):
        def on_step(self, trainer: Trainer, stats: StepStats) -> None:
            assert trainer.guarding.average is not None
            self.raw = lora.state(trainer.denoiser)
            self.average = [value.clone() for value in trainer.guarding.average.values]

    watch = Watch()
    trainer = Trainer(make(optimizer__ema_decay=0.9, evaluation__every=3), registry=registry(), callbacks=[watch])
    folder = trainer.train()
    raw, mean = torch.cat([t.flatten() for t in watch.raw.values()]), torch.cat([t.flatten() for t in watch.average])
    assert not torch.allclose(raw, mean)
    saved = lora.load_delta(folder)
    live = lora.current(trainer.denoiser)
    assert all(torch.equal(saved[name].down, live[name].down) for name in live)
    assert torch.equal(torch.cat([p.detach().flatten() for p in trainer.parameters]), mean)
    kept = load_file(folder / "checkpoints" / "step-000006" / "adapter.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in watch.raw.items()), "training goes on from the raw"


def test_weight_decay_and_regularization_hold_the_adapters_back(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    def drift(name: str, **options: object) -> float:
        folder = train(make(evaluation__every=20, training__steps=20, output=str(tmp_path / name), **options))
        return float(metrics(folder, "evaluation")[-1]["evaluation"]["drift"])

    free = drift("free")
    assert drift("decayed", optimizer__weight_decay=20.0) < 0.8 * free
    assert drift("pulled", regularization__weight=50.0) < 0.8 * free
    pulled = metrics(tmp_path / "pulled", "reward")
    assert pulled[0]["regularization"] == 0
    assert pulled[-1]["regularization"] > 0
    assert all(row["regularization"] == 0 for row in metrics(tmp_path / "free", "reward"))


# -- configs that cannot be meant -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"guards__patience": 3}, "guards.patience: goes by evaluations while training; set evaluation.every"),
        ({"guards__keep_best": True}, "guards.keep_best: goes by evaluations"),
        ({"guards__drift_limit": 0.2}, "guards.drift_limit: goes by evaluations"),
        ({"evaluation__every": 2, "prompts__heldout": None}, "evaluation.every: there is nothing to evaluate on"),
        (
            {"evaluation__every": 2, "guards__diversity_floor": 0.5, "evaluation__images_per_prompt": 1},
            "guards.diversity_floor: needs pairs",
        ),
        ({"evaluation__diversity_encoder": "clip"}, '"clip" is no term\'s label; the labels are redness'),
        ({"guards__patience": 0, "evaluation__every": 2}, "guards.patience"),
        ({"guards__max_dropped_steps": 0}, "guards.max_dropped_steps"),
        ({"optimizer__ema_decay": 1.0}, "optimizer.ema_decay"),
        ({"regularization__weight": -1.0}, "regularization.weight"),
    ],
)
def test_impossible_guards_are_refused(
    make: Callable[..., RunConfig], overrides: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**overrides)
    assert words in str(caught.value).replace(" (from the command line)", "")


def test_a_watched_score_nobody_measures_is_refused_before_anything_loads(make: Callable[..., RunConfig]) -> None:
    config = make(evaluation__every=2, guards__watch="red_shar", model__base="owner/name")
    with pytest.raises(ConfigError, match=r'"red_shar" is measured by no evaluation.*Did you mean "red_share"'):
        Trainer(config, registry=registry())


def test_an_encoder_without_image_features_is_refused(make: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r'reward of "redness" has no image features'):
        train(make(evaluation__every=2, evaluation__diversity_encoder="redness"))


# -- the evaluation at the end ----------------------------------------------------------------------------------------


class Scale(Callback):
    """Multiplies the adapters' B after a step, and after what the run itself did at that step."""

    def __init__(self, step: int, factor: float) -> None:
        self.step, self.factor = step, factor

    @torch.no_grad()
    def on_step(self, trainer: Trainer, stats: StepStats) -> None:
        if stats.step == self.step:
            for parameter in trainer.parameters[1::2]:
                parameter.mul_(self.factor)


def drawn(trainer: Trainer) -> list[int]:
    """Train, and return the step at each batch of pictures that an evaluation drew."""
    steps: list[int] = []
    sample = trainer.sampler.sample

    def counting(*arguments: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            steps.append(trainer.step_number)
        return sample(*arguments, **options)

    trainer.sampler.sample = counting  # type: ignore[method-assign]
    trainer.train()
    trainer.sampler.sample = sample  # type: ignore[method-assign]
    return steps


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 2, 4]),
        ({"optimizer__ema_decay": 0.9}, [0, 2, 4]),
        ({"evaluation__batch_size": 3}, [0, 0, 2, 2, 4, 4]),
        ({"guards": {"keep_best": True, "lower_is_better": True}}, [0, 2, 4]),
        ({"guards": {"keep_best": True}}, [0, 2, 4]),
        ({"evaluation__every": None}, [4, 4]),
    ],
    ids=["last", "average", "batches", "the start is the best", "the last is the best", "no other evaluation"],
)
def test_the_evaluation_at_the_end_draws_nothing_that_was_drawn(
    make: Callable[..., RunConfig], options: dict[str, Any], expected: list[int]
) -> None:
    settings: dict[str, Any] = {"training__steps": 4, "evaluation__every": 2, "evaluation__at_end": True}
    trainer = Trainer(make(**settings | options), registry=registry())
    assert drawn(trainer) == expected
    told = json.loads((trainer.output / "evaluation.json").read_text())
    measures = Measures(trainer)
    afresh = measures.compare({"base": measures.base, "tuned": nullcontext})
    assert told == json.loads(json.dumps(afresh.as_json() | {"step": told["step"], "stopped": None}))
    assert (told["tuned"]["redness"]["mean"] == told["base"]["redness"]["mean"]) is (told["step"] == 0)
    assert (trainer.output / "images" / "before_after.png").is_file()


def test_the_evaluation_at_the_end_draws_no_best_adapters_again(make: Callable[..., RunConfig]) -> None:
    settings: dict[str, Any] = {"training__steps": 6, "evaluation__every": 2, "evaluation__at_end": True}
    config = make(**settings, guards={"keep_best": True})
    trainer = Trainer(config, registry=registry(), callbacks=[Scale(3, -1.0)])
    assert drawn(trainer) == [0, 2, 4, 6]
    assert json.loads((trainer.output / "evaluation.json").read_text())["step"] == 2


def test_the_evaluation_at_the_end_draws_what_has_changed(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"training__steps": 4, "evaluation__every": 2, "evaluation__at_end": True}
    trainer = Trainer(make(**settings), registry=registry(), callbacks=[Scale(4, 1.001)])
    assert drawn(trainer) == [0, 2, 4, 4], "other adapters than the last evaluation's"
    further = make(**settings, lora__init_from=str(trainer.output), output=str(tmp_path / "further"))
    assert drawn(Trainer(further, registry=registry())) == [0, 2, 4, 4], "the start was not the base model"
    trainer = Trainer(make(**settings, output=str(tmp_path / "other")), registry=registry())
    measures = Measures(trainer)

    def scores() -> list[float]:
        return measures.compare({"tuned": nullcontext}).variants["tuned"].scores["redness"]

    first = scores()
    assert scores() is first
    assert trainer.heldout is not None
    trainer.heldout = replace(trainer.heldout, prompts=trainer.heldout.prompts[::-1])
    other = scores()
    assert other != first
    evaluation = trainer.config.evaluation.model_copy(update={"seed": 5})
    trainer.config = trainer.config.model_copy(update={"evaluation": evaluation})
    assert scores() not in (first, other)
    before = scores()
    measures.terms = [replace(measures.terms[0], reward=Redness()), *measures.terms[1:]]
    assert scores() == before
    assert scores() is not before


@pytest.mark.slow
def test_two_processes_stop_together(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    options: dict[str, Any] = {"evaluation__every": 2, "guards": {"drift_limit": 1e-9}, "regularization__weight": 0.1}
    one = train(make(**options, output=str(tmp_path / "one")))
    config = tmp_path / "two.json"
    config.write_text(make(**options, output=str(tmp_path / "two")).model_dump_json())
    script = tmp_path / "two.py"
    script.write_text(
        "from pathlib import Path\n"
        "from alignprop_core.config.sections import RunConfig\n"
        "from alignprop_core.training.trainer import Trainer\n"
        "from tests.training.test_guards import registry\n"
        f"config = RunConfig.model_validate_json(Path({str(config)!r}).read_text())\n"
        "trainer = Trainer(config, registry=registry())\n"
        "assert trainer.state.num_processes == 2\n"
        "trainer.train()\n"
        "assert trainer.step_number == 2, trainer.step_number\n"
    )
    root = ROOT
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)],
        check=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        timeout=200,
    )
    for a, b in zip(metrics(one, "reward"), metrics(tmp_path / "two", "reward"), strict=True):
        assert b["reward"] == pytest.approx(a["reward"], abs=1e-5)
        assert b["regularization"] == pytest.approx(a["regularization"], rel=1e-3, abs=1e-9)
