"""The evaluation at the end of a run: base against tuned, without generating the same images twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignprop_core.config.sections import RunConfig
from alignprop_core.evaluation.evaluator import Evaluator
from alignprop_core.mix.stats import StepStats
from alignprop_core.training.callback import Callback
from alignprop_core.training.trainer import Trainer
from tests.support.toy_rewards import Redness, registry
from tests.support.toy_runs import changed, toy_data


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Build a config; keyword arguments are overrides with dots written as double underscores."""
    base = toy_data(
        tiny_model, tmp_path, backprop={"strategy": "last_k", "k": 1}, sampling={"steps": 1, "guidance_scale": 2.0}
    )
    (tmp_path / "prompts.txt").write_text("a fox\ntwo owls\n")
    return lambda **overrides: changed(base, overrides, registry())


class Scale(Callback):
    """Multiplies the adapters' B after a step, and after what the run itself did at that step."""

    def __init__(self, step: int, factor: float) -> None:
        self.step, self.factor = step, factor

    @torch.no_grad()
    def on_step(self, trainer: Trainer, stats: StepStats) -> None:
        if stats.step == self.step:
            for parameter in trainer.parameters[1::2]:
                parameter.mul_(self.factor)


def evaluator_of(trainer: Trainer) -> Evaluator:
    """Return a new evaluator like the trainer's, which remembers nothing yet."""
    known = trainer.evaluator
    assert known is not None
    return Evaluator(trainer.sampler, known.terms, known.prompts, known.config, remember=True)


def generated(trainer: Trainer) -> list[int]:
    """Train, and return the step at each batch of images that an evaluation generated."""
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
        ({"early_stopping": {"restore_best": True, "mode": "min"}}, [0, 2, 4]),
        ({"early_stopping": {"restore_best": True}}, [0, 2, 4]),
        ({"evaluation__every": None}, [4, 4]),
    ],
    ids=["last", "average", "batches", "the start is the best", "the last is the best", "no other evaluation"],
)
def test_the_evaluation_at_the_end_draws_nothing_that_was_generated(
    make: Callable[..., RunConfig], options: dict[str, Any], expected: list[int]
) -> None:
    settings: dict[str, Any] = {"training__steps": 4, "evaluation__every": 2, "evaluation__at_end": True}
    trainer = Trainer(make(**settings | options), registry=registry())
    assert generated(trainer) == expected
    written = json.loads((trainer.output / "evaluation.json").read_text())
    afresh = evaluator_of(trainer).evaluate({"base": trainer.sampler.without_lora, "tuned": nullcontext})
    assert written == json.loads(json.dumps(afresh.as_json() | {"step": written["step"], "stopped": None}))
    assert (written["tuned"]["redness"]["mean"] == written["base"]["redness"]["mean"]) is (written["step"] == 0)
    assert (trainer.output / "images" / "before_after.png").is_file()


def test_the_final_evaluation_reuses_the_images_of_the_best_adapters(make: Callable[..., RunConfig]) -> None:
    settings: dict[str, Any] = {"training__steps": 6, "evaluation__every": 2, "evaluation__at_end": True}
    config = make(**settings, sampling__steps=3, early_stopping={"restore_best": True})
    trainer = Trainer(config, registry=registry(), callbacks=[Scale(3, -1.0)])
    assert generated(trainer) == [0, 2, 4, 6]
    assert json.loads((trainer.output / "evaluation.json").read_text())["step"] == 2


def test_the_final_evaluation_generates_what_has_changed(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"training__steps": 4, "evaluation__every": 2, "evaluation__at_end": True}
    trainer = Trainer(make(**settings), registry=registry(), callbacks=[Scale(4, 1.001)])
    assert generated(trainer) == [0, 2, 4, 4], "other adapters than the last evaluation's"
    further = make(**settings, lora__init_from=str(trainer.output), output=str(tmp_path / "further"))
    assert generated(Trainer(further, registry=registry())) == [0, 2, 4, 4], "the start was not the base model"
    trainer = Trainer(make(**settings, output=str(tmp_path / "other")), registry=registry())
    evaluator = evaluator_of(trainer)

    def scores() -> list[float]:
        return evaluator.evaluate({"tuned": nullcontext}).variants["tuned"].scores["redness"]

    first = scores()
    assert scores() is first
    evaluator.prompts = replace(evaluator.prompts, prompts=evaluator.prompts.prompts[::-1])
    other = scores()
    assert other != first
    evaluator.config = evaluator.config.model_copy(update={"seed": 5})
    assert scores() not in (first, other)
    before = scores()
    evaluator.terms = [replace(evaluator.terms[0], reward=Redness()), *evaluator.terms[1:]]
    assert scores() == before
    assert scores() is not before
