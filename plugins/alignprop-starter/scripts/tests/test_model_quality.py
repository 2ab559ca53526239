"""Quality of the shipped base model, measured with the functions of the training scripts."""

from __future__ import annotations

from typing import Any

import torch
from evaluate_model import generate, verdicts
from train_decoder import detail
from train_vae import psnr
from training_common import render_set

from alignprop_starter.judge import load_judge
from alignprop_starter.vocabulary import BACKGROUNDS, SPECIES, STYLES, caption


def test_the_autoencoder_reconstructs_unseen_scenes_with_their_detail(pipe: Any) -> None:
    """At least 30 dB, and sharp stripes: blur lowers the PSNR only a little."""
    images, layout = render_set(96, 7_000_000, "cpu", split="all")
    assert psnr(pipe.vae, images) >= 30
    assert detail(pipe.vae, images, layout.boxes) >= 0.8


def test_images_follow_every_word_of_their_prompts(pipe: Any) -> None:
    """The target is 80% for all four attributes; the measured value is 98%, so 34 images suffice."""
    requested = [(i * 3 % len(SPECIES), i % 4, i % 3, i % 8) for i in range(34)]
    prompts = [caption(SPECIES[a], n + 1, STYLES[s], BACKGROUNDS[b]) for a, n, s, b in requested]
    right = verdicts(load_judge(), generate(pipe, prompts, seed=11, batch=17), torch.tensor(requested))
    assert right["all"].float().mean() >= 0.85
