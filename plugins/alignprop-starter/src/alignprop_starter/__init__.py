"""A small text-to-image model with its demo, scenes, prompt sets, a judge, and weights for rewards.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from alignprop_core.hookspecs import hookimpl
from alignprop_core.specs import CommandSpec, ModelSpec, PromptSpec, RewardSpec, WeightsFile, WeightsSpec

_SOURCE = "https://github.com/alignprop/alignprop/tree/main/plugins/alignprop-starter"
_LICENSE = "Apache-2.0 AND MIT"
_ANIMALS = {
    "simple_animals": ("AlignProp's 45 training animals", 45),
    "eval_simple_animals": ("AlignProp's 6 held-out animals", 6),
}
VARIANTS = {
    "": "by name alone",
    "_number": "with a number from one to four",
    "_style": "with an art style",
    "_background": "with a place",
    "_full": "with number, style and place",
}
"""Suffix of a prompt set's name -> what its prompts contain besides the animal."""

_WEIGHTS = {
    "clip": (
        ("clip_score", "pickscore", "siglip_score", "reference_similarity"),
        "A small CLIP for starter scenes and their captions, and nothing else.",
        3_568_436,
        "d572cc56d6fc563b04c28d13bc1efc631139a5402568f3169c5ae3c66f14283a",
    ),
    "hpsv2": (
        ("hpsv2",),
        "The small CLIP, further trained to prefer the image that matches its caption; no human preferences.",
        3_568_436,
        "be7816db3f2675ae9d5cba649e15d653b8bb45f8020c3656bf3a1a01611ada86",
    ),
    "aesthetic": (
        ("aesthetic",),
        "Scores the composition of starter scenes; trained on rules, without human ratings.",
        546_082,
        "0e5583eacf1e5d2e5f882508265d8d3c9df1f69ca2efcd7b00efbc99e9a316b0",
    ),
    # Counting rewards look up weight sets by the name of the detector.
    "rtdetr": (
        ("rtdetr",),
        "A small RT-DETR that detects the 51 animals in starter scenes, and nothing else.",
        4_653_712,
        "55cea23284ddd8ded8089070087fbe471fd410a93ad048287706814ac16f8288",
    ),
}
"""File in `weights/` -> names that use it in the set `starter`, summary, size in bytes, sha256."""


def model_folder() -> Path:
    """Return the folder of the base model: a `StableDiffusionPipeline` for 128x128 pixels, float16 weights."""
    return Path(str(files("alignprop_starter"))) / "pipeline"


@hookimpl
def alignprop_register_models() -> Iterable[ModelSpec]:
    """Return the spec of the base model."""
    return [
        ModelSpec(
            name="starter",
            summary="51 animals, one to four per image, in 3 art styles and 8 places; 128x128, runs on a laptop.",
            path="alignprop_starter:model_folder",
            resolution=128,
            demo="alignprop_starter:demo.yaml",
            license=_LICENSE,
            source=_SOURCE,
        )
    ]


@hookimpl
def alignprop_register_commands() -> Iterable[CommandSpec]:
    """Return `alignprop demo`."""
    return [
        CommandSpec(
            path="demo",
            summary="Fine-tune a registered model on its demo config and write a before/after sheet.",
            factory="alignprop_starter.demo_command:demo",
            license="Apache-2.0",
        )
    ]


@hookimpl
def alignprop_register_prompts() -> Iterable[PromptSpec]:
    """Return the specs of the prompt sets: training and held-out animals, five variants each, and scenes of both."""
    sets = {
        f"{name}{ending}": (f"{animals} {content}.", size)
        for name, (animals, size) in _ANIMALS.items()
        for ending, content in VARIANTS.items()
    }
    sets["animal_scenes"] = ("AlignProp's 45 training animals, each in two numbers and places.", 90)
    sets["eval_animal_scenes"] = ("AlignProp's 6 held-out animals, each in six numbers and places.", 36)
    return [
        PromptSpec(
            name=f"starter/{name}",
            summary=summary,
            path=f"alignprop_starter:prompts/{name}.jsonl",
            size=size,
            license="Apache-2.0",
            source="https://arxiv.org/abs/2310.03739",
        )
        for name, (summary, size) in sets.items()
    ]


@hookimpl
def alignprop_register_rewards() -> Iterable[RewardSpec]:
    """Return the spec of the judge, as a measure."""
    return [
        RewardSpec(
            name="scene_accuracy",
            summary="1 if the starter's judge recognizes in the image what the prompt asks for, else 0.",
            factory="alignprop_starter.reward:SceneAccuracy",
            config="alignprop_starter.config:SceneAccuracyConfig",
            differentiable=False,
            needs_prompts=True,
            unit="fraction",
            typical_range=(0.0, 1.0),
            license=_LICENSE,
            source=_SOURCE,
            weights=(WeightsFile(file="alignprop_starter:judge/judge.safetensors", license=_LICENSE),),
        )
    ]


@hookimpl
def alignprop_register_weights() -> Iterable[WeightsSpec]:
    """Return the set `starter`: small weights for rewards of other plugins, trained on rendered scenes."""
    return [
        WeightsSpec(
            name="starter",
            reward=reward,
            summary=summary,
            path=f"alignprop_starter:weights/{file}.safetensors",
            license=_LICENSE,
            source=_SOURCE,
            weights=(WeightsFile(file=f"weights/{file}.safetensors", sha256=sha256, bytes=size, license=_LICENSE),),
        )
        for file, (rewards, summary, size, sha256) in _WEIGHTS.items()
        for reward in rewards
    ]
