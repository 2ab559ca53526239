"""Tests of the tiny pipelines that other tests use."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from diffusers import StableDiffusionPipeline

from tests.support.tiny import tiny_sd


def generate(pipeline: StableDiffusionPipeline, prompt: str = "a red cat") -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    images: torch.Tensor = pipeline(
        prompt, num_inference_steps=2, guidance_scale=3.0, generator=generator, output_type="pt"
    ).images
    return images


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_seed_gives_the_same_images_and_leaves_the_random_state(
    prediction_type: Literal["epsilon", "v_prediction"],
) -> None:
    before = torch.get_rng_state()
    one, two = tiny_sd(prediction_type=prediction_type, seed=1), tiny_sd(prediction_type=prediction_type, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    images = generate(one)
    assert images.shape == (1, 3, 32, 32)
    assert torch.equal(images, generate(two))
    assert not torch.equal(images, generate(tiny_sd(prediction_type=prediction_type, seed=2)))


def test_the_text_encoder_reads_the_prompt() -> None:
    pipeline = tiny_sd(cross_attention_dim=16)
    assert (generate(pipeline, "a red cat") - generate(pipeline, "a blue dog")).abs().max() > 1e-4
    ids = pipeline.tokenizer("a red cat").input_ids
    assert len(ids) == 9
    assert pipeline.tokenizer.decode(ids[1:-1]).strip() == "a red cat"


def test_float64_and_a_saved_folder_work(tmp_path: Path) -> None:
    pipeline = tiny_sd()
    pipeline.save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(generate(pipeline), generate(loaded))
    assert generate(pipeline.to(torch.float64)).dtype == torch.float64
