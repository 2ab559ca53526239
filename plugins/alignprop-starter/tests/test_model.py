"""The base model: a diffusers pipeline that follows prompts, its tokenizer, and its evaluation in the package."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from alignprop_core.prompts import load_prompts
from alignprop_core.registry.registry import default_registry
from alignprop_starter import alignprop_register_prompts, model_folder
from alignprop_starter.judge import load_judge
from alignprop_starter.vocabulary import SPECIES, WORDS, read_caption

PROMPTS = ["a 3d fox in a meadow", "two flat bears in the snow", "a noto lion on the beach", "a flat pig in the desert"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(model_folder())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_diffusers_loads_it(pipe: Any) -> None:
    assert pipe.vae.config.scaling_factor == 1.0
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.tokenizer.model_max_length == 32
    assert {p.dtype for m in (pipe.vae, pipe.unet, pipe.text_encoder) for p in m.parameters()} == {torch.float32}


def test_images_show_the_animal_of_the_prompt(pipe: Any) -> None:
    noise = torch.randn(len(PROMPTS), 8, 16, 16, generator=torch.Generator().manual_seed(1))
    out = pipe(PROMPTS, latents=noise, num_inference_steps=12, guidance_scale=3.0, output_type="pt")
    assert out.images.shape == (len(PROMPTS), 3, 128, 128)
    seen = load_judge().read(out.images.float())
    requested = [read_caption(prompt) for prompt in PROMPTS]
    species = [SPECIES[i] == request.species for i, request in zip(seen["species"].tolist(), requested, strict=True)]
    assert sum(species) >= 3


def test_a_guided_image_depends_on_its_prompt(pipe: Any) -> None:
    noise = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(2)).repeat(2, 1, 1, 1)
    prompts = ["a fox at night", "a fox in the snow"]
    images = pipe(prompts, latents=noise, num_inference_steps=4, guidance_scale=3.0, output_type="pt").images
    assert images[0].mean() < images[1].mean() - 0.2


def test_known_words_are_single_tokens_and_other_text_is_split(pipe: Any) -> None:
    tokenizer = pipe.tokenizer
    assert [word for word in WORDS if len(tokenizer.tokenize(word)) != 1] == []
    assert len(tokenizer.tokenize("Crème brûlée 狐")) > 8
    long = tokenizer("fox " * 500, truncation=True, max_length=tokenizer.model_max_length).input_ids
    assert len(long) == 32
    assert long[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("name", [spec.name for spec in alignprop_register_prompts()])
def test_all_prompts_consist_of_known_words(name: str) -> None:
    for prompt in load_prompts(name, default_registry()).prompts:
        assert set(prompt.replace("3d", "3 d").split()) <= set(WORDS)


def test_the_evaluation_of_the_model_is_complete() -> None:
    report = json.loads((model_folder().parent / "evaluation.json").read_text())
    assert report["steps"] == 12
    assert report["guidance_scale"] == 3.0
    assert report["seen"]["images"] >= 1000
    assert set(report["species"]) == set(SPECIES)
