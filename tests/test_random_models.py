"""Randomly damaged models and reward weights: each runs, or is refused with one of alignprop's errors on one line."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.errors import AlignpropError
from alignprop_core.registry.registry import Registry
from alignprop_core.reward import ImageBatch
from tests.support.damage import Change, changed, contents, damage
from tests.support.single_file import single_file_weights
from tests.support.tiny import tiny_sd

Load = Callable[[], object]
BATCH = ImageBatch(
    images=torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(0)), prompts=["two cats"], metadata=[{}]
)
NAMES = dict(enumerate(["cat", "dog", "fox"]))
BUILD: dict[str, tuple[Callable[[Path, Path], Load], int]] = {}


def kind(cases: int) -> Callable[[Callable[[Path, Path], Load]], Callable[[Path, Path], Load]]:
    """Register a function that writes files into its first folder, and returns one that loads and uses them."""

    def register(build: Callable[[Path, Path], Load]) -> Callable[[Path, Path], Load]:
        BUILD[build.__name__] = build, cases
        return build

    return register


def image_of(model: Path) -> Load:
    """Return what `alignprop train --dry-run` and `sample` do with a model."""
    registry, options = Registry.from_plugins({}), {"steps": 1, "guidance_scale": 3.0}

    def load() -> object:
        sampler = Sampler.load(str(model), sampling=options, device="cpu", registry=registry)
        return sampler(["a fox"], output="pil")

    return load


@kind(30)
def diffusers_folder(folder: Path, _: Path) -> Load:
    tiny_sd().save_pretrained(folder)
    return image_of(folder)


@kind(8)
def single_file(folder: Path, other: Path) -> Load:
    from safetensors.torch import save_file

    hub = other / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    tiny_sd().save_pretrained(hub / "snapshots" / ("0" * 40))
    save_file(single_file_weights(tiny_sd()), folder / "model.safetensors")
    return image_of(folder / "model.safetensors")


@kind(40)
def clip(folder: Path, _: Path) -> Load:
    from alignprop_clip.config import ClipScoreConfig
    from alignprop_clip.reward import ClipScore
    from alignprop_clip.testing import write_tiny_clip

    config = ClipScoreConfig(weights=str(write_tiny_clip(folder / "clip.safetensors")))
    return lambda: ClipScore(config).score(BATCH)


@kind(60)
def aesthetic(folder: Path, _: Path) -> Load:
    from safetensors.torch import save_file

    from alignprop_aesthetic.config import AestheticConfig
    from alignprop_aesthetic.reward import Aesthetic
    from alignprop_clip.testing import write_tiny_clip

    clip_file, head, widths = write_tiny_clip(folder / "clip.safetensors"), {}, (16, 8, 8, 4, 4, 1)
    for number, before, after in zip((0, 2, 4, 6, 7), widths[:-1], widths[1:], strict=True):
        head |= {f"layers.{number}.weight": torch.ones(after, before), f"layers.{number}.bias": torch.zeros(after)}
    save_file(head, folder / "head.safetensors", {"config": json.dumps({"clip": str(clip_file)})})
    config = AestheticConfig(weights=str(folder / "head.safetensors"))
    return lambda: Aesthetic(config).score(BATCH)


@kind(52)
def classifier_folder(folder: Path, _: Path) -> Load:
    import transformers

    from alignprop_classifier.config import ImageClassifierConfig
    from alignprop_classifier.reward import ImageClassifier

    config: Any = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], id2label=NAMES)
    transformers.ResNetForImageClassification(config).save_pretrained(folder)
    processor = {"image_processor_type": "ViTImageProcessor", "do_normalize": True, "do_rescale": True}
    processor |= {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.2] * 3, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    options = ImageClassifierConfig(model=f"transformers/{folder}", unnamed="ignore")
    return lambda: ImageClassifier(options).score(BATCH)


@kind(10)
def detector_folder(folder: Path, _: Path) -> Load:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    from alignprop_counting.config import ObjectCountConfig
    from alignprop_counting.reward import ObjectCount

    backbone = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    sizes = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 5, "encoder_layers": 1}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_layers": 1}
    DetrForObjectDetection(DetrConfig(backbone_config=backbone, id2label=NAMES, **sizes)).save_pretrained(folder)
    processor = {"image_processor_type": "DetrImageProcessor", "do_normalize": False, "do_rescale": True, "resample": 2}
    processor |= {"size": {"shortest_edge": 64, "longest_edge": 99}, "do_pad": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    config = ObjectCountConfig(detector="detr", weights=str(folder / "model.safetensors"), objects="cat", number=2)
    return lambda: ObjectCount(config).score(BATCH)


def fuzz(name: str, tmp_path: Path, examples: int) -> int:
    """Load damaged files; returns how many were refused."""
    folder, other = tmp_path / "model", tmp_path / "hub"
    folder.mkdir()
    torch.manual_seed(0)
    load, refused = BUILD[name][0](folder, other), 0
    files = contents(folder)
    load()  # undamaged

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(damage(files))
    def one(changes: dict[str, Change]) -> None:
        nonlocal refused
        with changed(folder, files, changes), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries' own
            try:
                load()
            except AlignpropError as error:
                refused += 1
                message = str(error)
                if "\n" in message:
                    raise AssertionError(f"unclear: {message}") from error

    one()
    return refused


SLOW = [pytest.param(name, cases * 10, marks=pytest.mark.slow) for name, (_, cases) in BUILD.items()]


@pytest.mark.parametrize(("name", "cases"), [*((name, cases) for name, (_, cases) in BUILD.items()), *SLOW])
def test_a_damaged_file_is_read_or_refused(
    name: str, cases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert os.environ.get("HF_HUB_OFFLINE") == "1"
    assert fuzz(name, tmp_path, cases) > cases / 3
