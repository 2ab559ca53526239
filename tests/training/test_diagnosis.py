"""A step that is not finite is attributed to its part and its prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignprop_core.config.sections import RunConfig
from alignprop_core.errors import RewardError, RunError
from alignprop_core.training.trainer import Trainer
from tests.support.toy_rewards import registry
from tests.support.toy_runs import changed, toy_data


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    base = toy_data(tiny_model, tmp_path, backprop={"strategy": "last_k", "k": 2})
    (tmp_path / "prompts.txt").write_text("a fox\ntwo owls\n")
    options = {"sampling__steps": 3, "training__batch_size": 2, "optimizer__max_skipped_steps": 1}
    return lambda **overrides: changed(base, options | overrides, registry())


def second_row(tensor: Tensor) -> Tensor:
    """Return a mask that is 1 in the second sample of a batch."""
    return (torch.arange(len(tensor)) == 1).view(-1, 1, 1, 1)


def prompts_of(trainer: Trainer) -> list[str]:
    return list(trainer.gradient._inputs(range(2), 0)[0])


def test_a_prediction(make: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(make(), registry=registry())
    family, prompts = trainer.sampler.family, prompts_of(trainer)
    predict, bad = family.predict, int(trainer.sampler.scheduler.timesteps[1])

    def failing(latents: Tensor, timestep: Tensor, conditioning: Any) -> Tensor:
        found = predict(latents, timestep, conditioning)
        return found.masked_fill(second_row(found), float("nan")) if int(timestep) == bad else found

    monkeypatch.setattr(family, "predict", failing)
    where = f'the prediction of denoising step 2 of 3, for the prompt "{prompts[1]}"'
    with pytest.raises(RewardError, match=f"Step 1: .*first value that is not finite is {where}"):
        trainer.train()


def test_a_decoded_image(make: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(make(backprop__decode_batch_size=1), registry=registry())
    family, prompts = trainer.sampler.family, prompts_of(trainer)
    decode = family.decode
    monkeypatch.setattr(family, "decode", lambda latents: decode(latents) / 0)
    with pytest.raises(RewardError, match=f'is the decoded image, for the prompt "{prompts[0]}"'):
        trainer.train()


@pytest.mark.parametrize(("part", "place"), [("predict", "denoising step 3 of 3"), ("decode", "the decoder")])
def test_a_backward_pass(
    make: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, part: str, place: str
) -> None:
    """Values are finite, but the slope of a square root at zero is not."""
    trainer = Trainer(make(), registry=registry())
    family, prompts = trainer.sampler.family, prompts_of(trainer)
    call, bad = getattr(family, part), int(trainer.sampler.scheduler.timesteps[2])

    def failing(latents: Tensor, *others: Any, **named: Any) -> Tensor:
        found: Tensor = call(latents, *others, **named)
        if part == "predict" and int(others[0]) != bad:
            return found
        return found + (found - found.detach()).sqrt()

    monkeypatch.setattr(family, part, failing)
    where = f'the backward pass of {place}, for the prompt "{prompts[0]}"'
    with pytest.raises(
        RunError, match=f"Step 1: the gradient is not finite.*first value that is not finite is {where}"
    ):
        trainer.train()


def test_the_score_of_one_prompt(make: Callable[..., RunConfig]) -> None:
    trainer = Trainer(make(rewards=[{"name": "not_a_number"}]), registry=registry())
    prompts = prompts_of(trainer)
    with pytest.raises(RewardError, match=f'the score of "not_a_number", for the prompt "{prompts[0]}"'):
        trainer.train()
