"""The gradient of a whole training step equals plain autograd's, its scale included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alignprop_core.diffusion.truncation import draw_truncation
from alignprop_core.reward import ImageBatch
from alignprop_core.training.step import choose_prompts
from alignprop_core.training.trainer import Trainer
from tests.support import toy_rewards
from tests.support.plain_autograd import plain_autograd
from tests.support.toy_rewards import Redness, RednessConfig
from tests.support.toy_runs import changed, toy_data

SEED, SAMPLES = 5, 6


def contrast(images: torch.Tensor) -> torch.Tensor:
    return images.var((1, 2, 3))


@pytest.mark.parametrize(
    "parts",
    [
        {"batch_size": 6},
        {"batch_size": 3, "gradient_accumulation_steps": 2},
        {"batch_size": 6, "backprop": {"decode_batch_size": 1, "sample_batch_size": 2}},
    ],
    ids=["whole", "accumulated", "chunks"],
)
def test_the_gradient_of_a_step_equals_plain_autograd(tiny_model: Path, tmp_path: Path, parts: dict[str, Any]) -> None:
    known = toy_rewards.registry().with_rewards({"contrast": contrast})
    parts = dict(parts)
    data = toy_data(
        tiny_model,
        tmp_path,
        rewards=[{"name": "redness", "options": {"gain": 10.0}, "weight": 0.5}, {"name": "contrast", "weight": -3.0}],
        backprop={"strategy": "last_k", "k": 2, **parts.pop("backprop", {})},
        optimizer={"learning_rate": 1e-2, "max_grad_norm": None},
        training={"steps": 1, "seed": SEED, "device": "cpu", **parts},
    )
    trainer = Trainer(changed(data, {}, known), registry=known)
    trainer.optimizer.zero_grad()
    stats = trainer.gradient.compute(0)
    parameters = trainer.optimizer.parameters
    actual = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    trainer.optimizer.zero_grad()

    everyone = range(SAMPLES)
    chosen = choose_prompts(len(trainer.prompts), seed=SEED, step=0, indices=everyone)
    prompts = [trainer.prompts.prompts[i] for i in chosen]
    sampler = trainer.sampler
    noise = sampler.noise(prompts, seed=SEED, step=0, indices=everyone)
    truncation = draw_truncation(sampler.backprop, sampler.step_sizes, seed=SEED, step=0)
    images = plain_autograd(trainer.pipeline, prompts, trainer.config.sampling, noise, truncation)
    redness = Redness(RednessConfig(gain=10.0)).score(
        ImageBatch(images=images, prompts=prompts, metadata=[{}] * SAMPLES)
    )
    total = (0.5 * redness - 3.0 * contrast(images)).mean()
    (-total).backward()
    expected = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])

    assert expected.norm() > 0
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * float(expected.norm()))
    assert stats.total == pytest.approx(total.item(), rel=1e-4)
    assert stats.grad_norm == pytest.approx(float(expected.norm()), rel=1e-4)


def test_the_logged_regularization_is_the_mean_over_samples_with_lv_samples_too(
    tiny_model: Path, tmp_path: Path
) -> None:
    """LV samples add rows to the batch, not samples: the loss that is logged is the one whose gradient is used."""
    logged = {}
    for lv_samples in (0, 2):
        data = toy_data(
            tiny_model,
            tmp_path,
            backprop={"strategy": "last_k", "k": 1, "lv_samples": lv_samples},
            regularization={"weight": 0.3},
            training={"steps": 1, "batch_size": 2, "device": "cpu"},
        )
        trainer = Trainer(changed(data, {}, toy_rewards.registry()), registry=toy_rewards.registry())
        with torch.no_grad():
            for parameter in trainer.parameters:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        stats = trainer.gradient.compute(0)
        assert stats.images == 2 * (1 + lv_samples)
        logged[lv_samples] = stats.as_json()["regularization"]
    assert logged[2] == pytest.approx(logged[0], rel=1e-5)
    assert logged[2] > 0
