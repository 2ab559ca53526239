"""The hpsv2 reward: scores and gradients; invalid files and options give one clear error."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import alignprop_hpsv2
from alignprop_clip.testing import PROMPTS, random_state, tiny_network, write_tiny_clip
from alignprop_clip.testing import random_batch as batch
from alignprop_core.errors import ConfigError, WeightsError
from alignprop_core.hookspecs import hookimpl
from alignprop_core.registry.registry import Registry
from alignprop_core.reward import ImageBatch, check_scores
from alignprop_core.specs import WeightsSpec
from alignprop_hpsv2.config import Hpsv2Config
from alignprop_hpsv2.reward import Hpsv2

PREPROCESSING = ["official", "center_crop"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("hpsv2") / "tiny.safetensors", dtype=torch.float32)


@pytest.fixture
def build(weights: Path) -> Callable[..., Hpsv2]:
    def build(**options: Any) -> Hpsv2:
        return Hpsv2(Hpsv2Config(**{"weights": str(weights), **options})).freeze()  # type: ignore[return-value]

    return build


def test_the_plugin_is_discovered_and_its_specs_load_without_torch() -> None:
    assert "alignprop_hpsv2" in {point.value for point in entry_points(group="alignprop")}
    code = (
        "import sys, alignprop_hpsv2, alignprop_hpsv2.config\n"
        "print(*(s.name for s in alignprop_hpsv2.alignprop_register_rewards()), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["hpsv2", "False"]
    (spec,) = alignprop_hpsv2.alignprop_register_rewards()
    assert spec.factory == f"{Hpsv2.__module__}:{Hpsv2.__name__}"
    assert spec.config == f"{Hpsv2Config.__module__}:{Hpsv2Config.__name__}"
    assert spec.needs_prompts
    assert all(field.description for field in Hpsv2Config.model_fields.values())


@pytest.mark.parametrize(("written", "version"), [(2.0, "2.0"), (2.1, "2.1"), ("2.1", "2.1"), ("v2.0", "2.0")])
def test_the_version_may_be_a_number_as_in_unquoted_yaml(written: object, version: str) -> None:
    registry = Registry.from_plugins({"alignprop-hpsv2": alignprop_hpsv2})
    assert registry.reward_options("hpsv2", {"version": written}).model_dump()["version"] == version


def test_the_spelling_of_earlier_versions_is_accepted() -> None:
    assert Hpsv2Config.model_validate({"preprocessing": "centre_crop"}).preprocessing == "center_crop"


@pytest.mark.parametrize("options", [{"version": "2.2"}, {"version": 3}, {"preprocessing": "crop"}, {"model": "x"}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Hpsv2Config.model_validate(options)
    with pytest.raises(ConfigError, match=rf"options\.{next(iter(options))}"):
        Registry.from_plugins({"alignprop-hpsv2": alignprop_hpsv2}).reward_options("hpsv2", options)


@pytest.mark.parametrize("preprocessing", PREPROCESSING)
def test_image_features_are_the_embeddings_behind_the_scores(preprocessing: str, build: Callable[..., Hpsv2]) -> None:
    reward = build(preprocessing=preprocessing)
    features = reward.image_features(batch().images)
    torch.testing.assert_close((features * reward.encoder.prompts(PROMPTS)).sum(1), reward.score(batch()))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("preprocessing", PREPROCESSING)
def test_the_gradient_reaches_every_pixel_and_is_the_derivative(
    preprocessing: str, build: Callable[..., Hpsv2]
) -> None:
    reward = build(preprocessing=preprocessing).double()
    images = batch(1, 37, 33, torch.float64).images.requires_grad_()
    score = reward.score(ImageBatch(images=images, prompts=PROMPTS[:1]))
    assert score.dtype == torch.float64
    (gradient,) = torch.autograd.grad(score.sum(), images)
    assert gradient.isfinite().all()
    assert (gradient[..., 3:-3, :] != 0).all()
    assert torch.autograd.gradcheck(
        lambda x: reward.score(ImageBatch(images=x, prompts=PROMPTS[:1])), (images,), fast_mode=True
    )
    assert not any(parameter.requires_grad for parameter in reward.parameters())


@pytest.mark.parametrize("size", [1, 5, 64])
def test_scores_are_independent_of_the_batch_and_inputs_are_not_modified(
    size: int, build: Callable[..., Hpsv2]
) -> None:
    reward, given = build(), batch(size)
    kept = given.images.clone()
    together = check_scores("hpsv2", reward.score(given), size, differentiable=False)
    alone = torch.cat([reward.score(given[i : i + 1]) for i in range(size)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert torch.equal(given.images, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_score_in_float32_also_under_autocast(
    dtype: torch.dtype, build: Callable[..., Hpsv2]
) -> None:
    images = batch(dtype=dtype).images.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = build().score(ImageBatch(images=images, prompts=PROMPTS))
    assert scores.dtype == torch.float32
    exact = build().score(ImageBatch(images=images.detach().float(), prompts=PROMPTS))
    torch.testing.assert_close(scores.detach(), exact, rtol=1e-5, atol=1e-6)
    scores.sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert (images.grad != 0).any()


@pytest.mark.parametrize("shape", [(32, 32), (32, 3000), (257, 33), (512, 512), (31, 65)])
@pytest.mark.parametrize("preprocessing", PREPROCESSING)
def test_any_size_and_aspect(preprocessing: str, shape: tuple[int, int], build: Callable[..., Hpsv2]) -> None:
    images = batch(1, *shape).images.requires_grad_()
    scores = build(preprocessing=preprocessing).score(ImageBatch(images=images, prompts=PROMPTS[:1]))
    check_scores("hpsv2", scores, 1, differentiable=True).sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert (images.grad != 0).any()


def test_an_image_whose_longest_side_fits_is_only_padded(build: Callable[..., Hpsv2]) -> None:
    """The original does not pad such an image and fails; with manual padding the score is the same."""
    images = batch(1, 32, 20).images
    padded = torch.nn.functional.pad(images, (6, 6))
    reward = build()
    torch.testing.assert_close(
        reward.score(ImageBatch(images=images, prompts=["a cat"])),
        reward.score(ImageBatch(images=padded, prompts=["a cat"])),
    )


def test_gradient_ascent_raises_the_score(build: Callable[..., Hpsv2]) -> None:
    reward, images = build(), batch().images
    before = reward.score(batch())
    for _ in range(10):
        images = images.detach().requires_grad_()
        score = reward.score(ImageBatch(images=images, prompts=PROMPTS))
        (gradient,) = torch.autograd.grad(score.sum(), images)
        images = (images + 0.01 * gradient.sign()).clamp(0, 1)
    assert (reward.score(ImageBatch(images=images.detach(), prompts=PROMPTS)) > before).all()


def test_missing_weights_are_reported_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"HPS_v2\.1_compressed\.pt .*xswu/HPSv2.* `alignprop rewards fetch hpsv2`"):
        Hpsv2()
    with pytest.raises(WeightsError, match=r"`alignprop rewards fetch hub:xswu/HPSv2/HPS_v2_compressed\.pt`"):
        Hpsv2(Hpsv2Config(version="2.0"))


def test_files_of_the_other_version_and_of_other_models_are_refused(tmp_path: Path) -> None:
    state = tiny_network(bias=None).state_dict()
    torch.save({"state_dict": state}, tmp_path / "HPS_v2_compressed.pt")
    with pytest.raises(WeightsError, match=r"contains version 2\.0, but the options set version 2\.1\. Set version"):
        Hpsv2(Hpsv2Config(weights=str(tmp_path / "HPS_v2_compressed.pt")))
    with pytest.raises(WeightsError, match=r"contains another model than ViT-H-14"):
        Hpsv2(Hpsv2Config(weights=str(tmp_path / "HPS_v2_compressed.pt"), version="2.0"))
    torch.save(torch.nn.Linear(2, 2), tmp_path / "pickled.pt")
    with pytest.raises(WeightsError, match="would need unpickling"):
        Hpsv2(Hpsv2Config(weights=str(tmp_path / "pickled.pt")))


def test_a_named_weight_set_is_found_through_the_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tiny_starter_preference"
    package.mkdir()
    (package / "__init__.py").write_text("")
    write_tiny_clip(package / "hpsv2.safetensors")
    monkeypatch.syspath_prepend(str(tmp_path))

    class Plugin:
        @hookimpl
        def alignprop_register_weights(self) -> list[WeightsSpec]:
            path = "tiny_starter_preference:hpsv2.safetensors"
            return [WeightsSpec(name="starter", reward="hpsv2", path=path, summary="tiny")]

    registry = Registry.from_plugins({"alignprop-hpsv2": alignprop_hpsv2, "tiny-starter": Plugin()})
    monkeypatch.setattr("alignprop_core.weights.find.default_registry", lambda: registry)
    scores = registry.load_reward("hpsv2", {"weights": "starter", "version": 2.0}).score(batch())
    assert scores.std() > 0
    assert scores.abs().max() <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_full_size_reward_reaches_the_pixels(precision: Any, tmp_path: Path) -> None:
    from alignprop_clip.architecture import Architecture

    torch.save({"state_dict": random_state(Architecture.from_name("ViT-H-14"))}, tmp_path / "HPS_v2.1_compressed.pt")
    config = Hpsv2Config(weights=str(tmp_path / "HPS_v2.1_compressed.pt"), precision=precision)
    reward = Hpsv2(config).freeze().cuda()
    images = torch.rand(4, 3, 512, 512, device="cuda", requires_grad=True)
    reward.score(ImageBatch(images=images, prompts=PROMPTS)).sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert (images.grad != 0).float().mean() > 0.9
