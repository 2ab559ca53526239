"""Images that are not finite are never shown or saved: the network, denoising step, prompt and seed are named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignprop_core.config.model import SamplingConfig
from alignprop_core.config.sections import EvaluationConfig
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.errors import RewardError, RunError
from alignprop_core.evaluation.evaluator import Evaluator
from alignprop_core.lora import adapters as lora
from alignprop_core.mix.term import Term
from alignprop_core.prompts import PromptSet
from alignprop_core.reward import ImageBatch, Reward
from tests.support.toy_rewards import Redness

PROMPTS = ("a fox", "two owls", "a hill")


@pytest.fixture
def sampler(tiny_sd: Callable[..., Any]) -> Sampler:
    return Sampler(tiny_sd(), SamplingConfig(steps=3, guidance_scale=2.0))


def overflow(network: nn.Module, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a network's output infinite from a number of calls on, as float16 activations beyond 65504 are."""
    inner, count = network.forward, iter(range(1000))

    def forward(*inputs: Any, **named: Any) -> Any:
        found = inner(*inputs, **named)
        if next(count) < calls:
            return found
        return (found[0] * torch.inf, *found[1:]) if isinstance(found, tuple) else found * torch.inf

    monkeypatch.setattr(network, "forward", forward)


def evaluator(sampler: Sampler, reward: Reward, folder: Path) -> Evaluator:
    prompts = PromptSet("mine", PROMPTS, ({}, {}, {}))
    config = EvaluationConfig(images_per_prompt=2, batch_size=4, seed=9)
    return Evaluator(sampler, [Term("mine", reward)], prompts, config, failures=folder / "not_finite.png")


def test_an_image_that_is_not_finite_names_network_step_prompt_and_seed(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict, bad = sampler.family.predict, int(sampler.scheduler.timesteps[1])

    def failing(latents: Tensor, timestep: Tensor, conditioning: Any) -> Tensor:
        found: Tensor = predict(latents, timestep, conditioning)
        return found * torch.inf if int(timestep) == bad else found

    monkeypatch.setattr(sampler.family, "predict", failing)
    where = r'the prediction of the unet in denoising step 2 of 3, for the prompt "a fox" \(sample 0, seed 7\)'
    with pytest.raises(RunError, match=f"images are not finite: .*{where}.*bf16") as caught:
        sampler(["a fox"], seed=7, output="pil")
    assert caught.value.exit_code == 1


def test_a_decoder_that_overflows_is_named(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    overflow(sampler.family.pipeline.vae.decoder, 0, monkeypatch)
    with pytest.raises(RunError, match=r'the vae from finite latents, for the prompt "two owls" \(sample 0, seed 3\)'):
        sampler(["two owls"], seed=3, output="pil")


def test_an_evaluation_names_the_sample_whose_image_is_not_finite(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lora.attach(sampler.family.denoiser, rank=2)
    overflow(sampler.family.pipeline.vae.decoder, 1, monkeypatch)  # the second batch: the last prompt
    with pytest.raises(RunError, match=r'the vae .*, for the prompt "a hill" \(sample 4, seed 9\)'):
        evaluator(sampler, Redness(), tmp_path).evaluate({"base": sampler.without_lora}, drift=False)


def test_an_evaluation_names_the_sample_whose_score_is_not_finite_and_saves_its_image(
    sampler: Sampler, tmp_path: Path
) -> None:
    class Moody(Redness):
        def score(self, batch: ImageBatch) -> Tensor:
            owls = torch.tensor(["owls" in prompt for prompt in batch.prompts])
            return super().score(batch).masked_fill(owls, torch.nan)

    saved = re.escape(str(tmp_path / "not_finite.png"))
    where = rf'the score of "mine" .*, nan, for the prompt "two owls" \(sample 2, seed 9; the image is saved as {saved}'
    with pytest.raises(RewardError, match=where):
        evaluator(sampler, Moody(), tmp_path).evaluate({"base": sampler.without_lora}, drift=False)
    assert (tmp_path / "not_finite.png").is_file()
