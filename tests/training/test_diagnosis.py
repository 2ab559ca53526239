"""A step that is not finite is attributed to its part and its prompt."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from alignprop_core.config.sections import RunConfig
from alignprop_core.errors import RewardError, RunError
from alignprop_core.images import to_pil
from alignprop_core.training.trainer import Trainer
from tests.support.toy_rewards import registry
from tests.support.toy_runs import changed, toy_data


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    base = toy_data(tiny_model, tmp_path, backprop={"strategy": "last_k", "k": 2})
    (tmp_path / "prompts.txt").write_text("a fox\ntwo owls\n")
    options = {"sampling__steps": 3, "training__batch_size": 2, "optimizer__max_skipped_steps": 1}
    return lambda known=None, **overrides: changed(base, options | overrides, known or registry())


def second_row(tensor: Tensor) -> Tensor:
    """Return a mask that is 1 in the second sample of a batch."""
    return (torch.arange(len(tensor)) == 1).view(-1, 1, 1, 1)


def prompts_of(trainer: Trainer) -> list[str]:
    return list(trainer.gradient._inputs(range(trainer.config.training.batch_size), 0)[0])


def test_a_prediction(make: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(make(), registry=registry())
    family, prompts = trainer.sampler.family, prompts_of(trainer)
    predict, bad = family.predict, int(trainer.sampler.scheduler.timesteps[1])

    def failing(latents: Tensor, timestep: Tensor, conditioning: Any) -> Tensor:
        found = predict(latents, timestep, conditioning)
        return found.masked_fill(second_row(found), float("nan")) if int(timestep) == bad else found

    monkeypatch.setattr(family, "predict", failing)
    where = rf'the prediction of the unet in denoising step 2 of 3, for the prompt "{prompts[1]}" \(sample 1, seed 0\)'
    message = f"Step 1: the model's images are not finite. The first value that is not finite is {where}.*bf16"
    with pytest.raises(RunError, match=message) as caught:
        trainer.train()
    assert not isinstance(caught.value, RewardError), "no reward is to blame"


def test_a_decoded_image(make: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(make(backprop__decode_batch_size=1), registry=registry())
    family, prompts = trainer.sampler.family, prompts_of(trainer)
    decode = family.decode
    monkeypatch.setattr(family, "decode", lambda latents: decode(latents) / 0)
    message = f"images are not finite.*the image decoded by the vae from finite latents, for the prompt .{prompts[0]}"
    with pytest.raises(RunError, match=message):
        trainer.train()


@pytest.mark.parametrize(
    ("part", "place"), [("predict", "the unet in denoising step 3 of 3"), ("decode", "the decoder")]
)
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


@pytest.mark.parametrize("part", ["score", "gradient"])
def test_the_score_or_gradient_of_one_prompt_is_named_and_its_image_saved(
    make: Callable[..., RunConfig], part: str
) -> None:
    def moody(images: Tensor, prompts: list[str]) -> Tensor:
        owls = torch.tensor(["owls" in prompt for prompt in prompts])
        bright = images.mean((1, 2, 3))
        if part == "score":
            return bright.masked_fill(owls, float("nan"))
        slope = torch.where(owls, torch.nan, 1.0)
        if bright.requires_grad:
            bright.register_hook(lambda gradient: gradient * slope)
        return bright

    prompts = Path(make().prompts.train)
    prompts.write_text("a fox\na hill\ntwo owls\n")  # the trial before the run is of the first two
    known = registry().with_rewards({"moody": moody})
    trainer = Trainer(make(known, rewards=[{"name": "moody"}], training__batch_size=3), registry=known)
    row = prompts_of(trainer).index("two owls")
    place = 'the score of "moody"' if part == "score" else 'the gradient of "moody" at the image'
    where = (
        rf'{place}, for the prompt "two owls" \(sample {row}, seed 0; the image is saved as (.+not_finite-000001.png)\)'
    )
    with pytest.raises(RunError, match=where) as caught:
        trainer.train()
    saved = re.search(where, str(caught.value))
    assert saved is not None
    inputs = trainer.gradient._inputs([row], 0)
    with Image.open(saved[1]) as image, torch.no_grad():
        latents = trainer.sampler.sample(inputs[0], inputs[2]).latents
        expected = np.asarray(to_pil(trainer.sampler.decode(latents)[0]))
        assert abs(np.asarray(image).astype(int) - expected).max() <= 1
