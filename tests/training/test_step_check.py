"""Steps that are not finite or have a gradient spike are skipped and reported; too many in a row stop the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from alignprop_core.config.sections import OptimizerConfig, RunConfig
from alignprop_core.errors import RewardError, RunError
from alignprop_core.hookspecs import hookimpl
from alignprop_core.lora import adapters as lora
from alignprop_core.mix.stats import StepStats
from alignprop_core.registry.registry import Registry
from alignprop_core.reward import ImageBatch
from alignprop_core.specs import RewardSpec
from alignprop_core.training.callback import Callback
from alignprop_core.training.step_check import StepCheck
from alignprop_core.training.trainer import Trainer
from tests.support import toy_rewards
from tests.support.toy_rewards import NotANumber, Redness
from tests.support.toy_runs import changed, metrics, toy_data


class Moody(Redness):
    """Redness whose gradient is multiplied in the training batches (of four) whose numbers are in `factors`."""

    factors: dict[int, float] = {}  # noqa: RUF012
    calls = 0

    def score(self, batch: ImageBatch) -> Tensor:
        score = super().score(batch)
        if batch.images.requires_grad and len(batch) == 4:
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
                factory=f"{__name__}:Moody",
                config="tests.support.toy_rewards:RednessConfig",
            )
        ]


def registry() -> Registry:
    toys = SimpleNamespace(alignprop_register_rewards=toy_rewards.alignprop_register_rewards)
    return Registry.from_plugins({"toy-rewards": toys, "moody": Plugin()})


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Build a config; keyword arguments are overrides with dots written as double underscores."""
    base = toy_data(tiny_model, tmp_path, backprop={"strategy": "last_k", "k": 1})
    (tmp_path / "prompts.txt").write_text("a fox\ntwo owls\n")
    return lambda **overrides: changed(base, overrides, registry())


def train(config: RunConfig, **options: Any) -> Path:
    return Path(Trainer(config, registry=registry(), **options).train())


@pytest.mark.parametrize(("factor", "why"), [(float("nan"), "not finite"), (1e9, "times the median")])
def test_a_bad_step_is_skipped_and_the_run_continues(
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
    rows = metrics(folder, "total")
    assert [row["step"] for row in rows if row["skipped"]] == [10]
    assert why in rows[9]["skipped"]
    assert '"moody"' in rows[9]["skipped"]
    assert '"redness"' not in rows[9]["skipped"]
    assert "step 10 skipped: " in capsys.readouterr().err
    before, at, after = Watch.states[8:11]
    assert all(torch.equal(at[name], before[name]) for name in before)
    assert any(not torch.equal(after[name], at[name]) for name in before)


def test_repeated_bad_steps_stop_the_run_with_the_last_good_state(make: Callable[..., RunConfig]) -> None:
    Moody.calls, Moody.factors = 0, {n: float("nan") for n in range(4, 99)}
    config = make(rewards=[{"name": "moody"}], optimizer__max_skipped_steps=2)
    with pytest.raises(
        RunError, match=r'Step 5: .*the gradient of "moody" at the images is not.* the 1 before it were skipped'
    ):
        train(config)
    folder = Path(config.output)
    assert [bool(row["skipped"]) for row in metrics(folder, "total")] == [False] * 3 + [True] * 2
    kept = load_file(folder / "checkpoints" / "step-000005" / "adapter.safetensors")
    Moody.calls, Moody.factors = 0, {}
    good = make(rewards=[{"name": "moody"}], training__steps=3, output=str(folder.parent / "good"))
    expected = load_file(train(good) / "checkpoints" / "step-000003" / "adapter.safetensors")
    assert all(torch.equal(kept[name], expected[name]) for name in expected)
    Moody.calls, Moody.factors = 0, {}
    train(config, resume=folder)
    assert [row["step"] for row in metrics(folder, "total")] == [1, 2, 3, 4, 5, 6]


def test_a_score_that_is_not_finite_names_its_reward_when_it_stays_so(make: Callable[..., RunConfig]) -> None:
    with pytest.raises(RewardError, match=r'Step 1: reward "not_a_number" returned a score that is not finite'):
        train(make(rewards=[{"name": "not_a_number"}], optimizer__max_skipped_steps=1))


@pytest.mark.parametrize("given", [False, True])
def test_the_advice_for_a_bad_score_is_a_command_that_works(tiny_model: Path, tmp_path: Path, given: bool) -> None:
    """Of the reward's name and not of its label; and none for an object, which no command can find."""
    rewards = [{"name": "mine"} if given else {"name": "not_a_number", "label": "odd"}]
    known = toy_rewards.registry().with_rewards({"mine": NotANumber()} if given else {})
    config = changed(toy_data(tiny_model, tmp_path, rewards=rewards), {"optimizer__max_skipped_steps": 1}, known)
    with pytest.raises(RewardError) as caught:
        Trainer(config, registry=known).train()
    assert ("--reward not_a_number" in str(caught.value)) is not given
    assert ("alignprop score" in str(caught.value)) is not given


def test_a_run_without_one_good_step_fails(make: Callable[..., RunConfig]) -> None:
    with pytest.raises(RewardError, match=r"Step 2: .*This step and the 1 before it were skipped"):
        train(make(rewards=[{"name": "not_a_number"}], training__steps=2))


nan, inf = float("nan"), float("inf")


def stats_of(norm: float, raw: float = 0.0, **terms: float) -> StepStats:
    """Return the statistics of a step of one image: the gradient's norm, raw scores, and the terms' gradient norms."""
    stats = StepStats.zeros(tuple(terms) or ("a",), torch.device("cpu"))
    stats["images"] = 1
    stats["grad_norm"] = norm
    stats["raw"] = raw
    stats["image_square"] = torch.tensor(list(terms.values()) or [0.0], dtype=torch.float64) ** 2
    return stats


def test_a_spike_is_measured_against_the_median_and_needs_enough_steps() -> None:
    check = StepCheck(OptimizerConfig(spike_threshold=10.0))

    def reason(step: int, norm: float) -> str | None:
        return check.reason_to_skip(step, stats_of(norm))

    assert reason(1, 1e6) is None, "there is no median yet"
    assert all(reason(step, 0.0) is None for step in range(2, 20)), "saturated steps do not enter the median"
    assert all(reason(step, 1.0) is None for step in range(20, 28))
    assert reason(28, 9.0) is None
    assert reason(29, 11.0) == "its gradient norm 11 is 11 times the median"
    off = StepCheck(OptimizerConfig(spike_threshold=None))
    assert [off.reason_to_skip(step, stats_of(norm)) for step, norm in enumerate([1.0] * 20 + [1e30])] == [None] * 21
    again = StepCheck(OptimizerConfig(spike_threshold=10.0))
    again.load(json.loads(json.dumps(check.as_json())))
    assert again.as_json() == check.as_json()


def test_a_score_that_is_not_finite_is_a_reason_whatever_the_gradient() -> None:
    check = StepCheck(OptimizerConfig(max_skipped_steps=1), {"b": "with this command"})
    assert check.reason_to_skip(1, stats_of(1.0, raw=inf, b=1.0)) == '"b" returned a score that is not finite'
    with pytest.raises(RewardError, match=r'Step 1: reward "b" .*\(inf\).* Check the reward on an image with this'):
        check.raise_if_failing()
    assert check.reason_to_skip(2, stats_of(nan, raw=nan, b=1.0)) is not None


def test_a_bad_gradient_names_the_terms_that_cause_it() -> None:
    check = StepCheck(OptimizerConfig(spike_threshold=10.0, max_skipped_steps=1))

    def message(norm: float, **terms: float) -> str:
        assert check.reason_to_skip(20, stats_of(norm, **terms)) is not None
        with pytest.raises(RunError) as caught:
            check.raise_if_failing()
        return str(caught.value)

    for step in range(10):
        assert check.reason_to_skip(step, stats_of(1.0, a=2.0, b=3.0)) is None
    assert 'the gradient of "b" at the images is not' in message(nan, a=2.0, b=nan)
    assert 'the gradient of "a" and "b" at the images' in message(nan, a=inf, b=nan)
    reported = message(nan, a=2.0, b=3.0)
    assert "so are the gradients of all rewards at the images" in reported
    assert "infinite slope" not in reported
    assert 'the median of recent steps is 1 (at the images: "b" 50 times).' in message(100.0, a=2.0, b=150.0)
    assert "the median of recent steps is 1. " in message(100.0, a=2.0, b=3.0), "it grew behind the images"
    again = StepCheck(check.config)
    again.load(json.loads(json.dumps(check.as_json())))
    assert again.terms == {"a": [2.0] * 10, "b": [3.0] * 10}
