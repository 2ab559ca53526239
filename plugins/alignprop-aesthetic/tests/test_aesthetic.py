"""The aesthetic reward: the published formula in float64, all key styles, invalid heads, scores and gradients."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

import alignprop_aesthetic
from alignprop_aesthetic.config import AestheticConfig
from alignprop_aesthetic.head import WIDTHS, read_head
from alignprop_aesthetic.published import HEAD_WEIGHTS
from alignprop_aesthetic.reward import Aesthetic
from alignprop_clip.testing import CLIP, random_state, tiny_network, write_tiny_clip
from alignprop_clip.testing import random_batch as batch
from alignprop_core.errors import WeightsError
from alignprop_core.hookspecs import hookimpl
from alignprop_core.registry.registry import Registry
from alignprop_core.reward import ImageBatch, check_scores
from alignprop_core.specs import WeightsSpec

LINEAR, RELU = (0, 2, 4, 6, 7), (0, 3, 6, 9, 11)
SMALL = (CLIP["embed_dim"], 24, 12, 8, 6, 1)


def head_state(
    widths: tuple[int, ...] = WIDTHS, numbers: tuple[int, ...] = LINEAR, prefix: str = ""
) -> dict[str, Tensor]:
    """Random weights under the author's keys, large enough for every layer to change the result."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for number, (inside, outside) in zip(numbers, pairwise(widths), strict=True):
        weight = torch.randn(outside, inside, generator=generator) * 2 / inside**0.5
        state[f"{prefix}layers.{number}.weight"] = weight
        state[f"{prefix}layers.{number}.bias"] = torch.randn(outside, generator=generator)
    return state


def published_formula(embedding: Tensor, state: dict[str, Tensor], *, relu: bool = False) -> Tensor:
    """LAION's predictor in float64: normalize, then layer by layer (dropout is the identity)."""
    x = embedding.double()
    x = x / x.norm(dim=-1, keepdim=True)
    numbers = sorted({int(key.split(".")[-2]) for key in state})
    prefix = next(iter(state)).rpartition("layers.")[0] + "layers."
    for number in numbers:
        x = x @ state[f"{prefix}{number}.weight"].double().T + state[f"{prefix}{number}.bias"].double()
        if relu and number != numbers[-1]:
            x = x.clamp(min=0)
    return x[:, 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP model, and a head whose header names it."""
    folder = tmp_path_factory.mktemp("aesthetic")
    write_tiny_clip(folder / "clip.safetensors", dtype=torch.float32)
    save_file(head_state(SMALL), folder / "head.safetensors", metadata={"config": '{"clip": "starter"}'})
    return folder


@pytest.fixture
def build(folder: Path) -> Callable[..., Aesthetic]:
    def build(**options: Any) -> Aesthetic:
        options = {
            "weights": str(folder / "head.safetensors"), "clip_weights": str(folder / "clip.safetensors"), **options
        }  # fmt: skip
        return Aesthetic(AestheticConfig(**options)).freeze()  # type: ignore[return-value]

    return build


def test_the_plugin_is_discovered_and_its_specs_load_without_torch() -> None:
    assert "alignprop_aesthetic" in {point.value for point in entry_points(group="alignprop")}
    code = (
        "import sys, alignprop_aesthetic, alignprop_aesthetic.config\n"
        "print(*(s.name for s in alignprop_aesthetic.alignprop_register_rewards()), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["aesthetic", "False"]
    (spec,) = alignprop_aesthetic.alignprop_register_rewards()
    assert spec.factory == f"{Aesthetic.__module__}:{Aesthetic.__name__}"
    assert spec.config == f"{AestheticConfig.__module__}:{AestheticConfig.__name__}"
    assert not spec.needs_prompts
    assert all(field.description for field in AestheticConfig.model_fields.values())


def test_image_features_are_the_inputs_of_the_head(build: Callable[..., Aesthetic]) -> None:
    reward = build()
    features = reward.image_features(batch().images)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(reward.head(features), reward.score(batch()))


@pytest.mark.parametrize("prefix", ["", "mlp.", "module.", "model.module."])
@pytest.mark.parametrize("nested", [False, True])
def test_a_full_size_head_computes_the_published_formula(tmp_path: Path, prefix: str, nested: bool) -> None:
    from alignprop_core.weights import load_state_dict

    state = head_state(prefix=prefix)
    torch.save({"state_dict": state, "epoch": 3} if nested else state, tmp_path / "head.pth")
    head = read_head(load_state_dict(tmp_path / "head.pth"), "head.pth", "none")
    embedding = torch.randn(50, 768, generator=torch.Generator().manual_seed(1))
    unit = torch.nn.functional.normalize(embedding, dim=-1)
    torch.testing.assert_close(head(unit).double(), published_formula(embedding, state), rtol=1e-5, atol=1e-5)
    assert published_formula(embedding, state).std() > 0.1


def test_a_head_without_the_prefix_layers_in_its_keys(tmp_path: Path) -> None:
    state = {key.removeprefix("layers."): value for key, value in head_state().items()}
    unit = torch.nn.functional.normalize(torch.randn(5, 768), dim=-1)
    assert torch.equal(read_head(state, "x", "none")(unit), read_head(head_state(), "x", "none")(unit))


def test_the_head_with_relu() -> None:
    state = head_state(numbers=RELU)
    embedding = torch.randn(50, 768, generator=torch.Generator().manual_seed(1))
    unit = torch.nn.functional.normalize(embedding, dim=-1)
    expected = published_formula(embedding, state, relu=True)
    torch.testing.assert_close(read_head(state, "x", "relu")(unit).double(), expected, rtol=1e-5, atol=1e-5)
    assert (published_formula(embedding, state) - expected).abs().max() > 0.1
    with pytest.raises(WeightsError, match=r"x is a head with ReLU .*: set the option activation: relu"):
        read_head(state, "x", "none")
    with pytest.raises(WeightsError, match=r"x is a head without ReLU .*: set the option activation: none"):
        read_head(head_state(), "x", "relu")


def test_the_linear_head_is_affine_so_it_never_saturates() -> None:
    """The reason for the warning in the README: the slope of the score is constant along any direction."""
    head = read_head(head_state(), "x", "none").double()
    points = torch.randn(2, 768, dtype=torch.float64)
    middle = head(points.mean(0, keepdim=True))
    torch.testing.assert_close(middle, head(points).mean(0, keepdim=True), rtol=1e-9, atol=1e-9)


def test_the_reward_is_the_formula_on_open_clips_embedding(folder: Path, build: Callable[..., Aesthetic]) -> None:
    from alignprop_clip.checkpoint import to_open_clip
    from alignprop_core.weights import load_state_dict

    network = tiny_network()
    network.load_state_dict(to_open_clip(load_state_dict(folder / "clip.safetensors"), "", vocabulary=49408))
    reward = build()
    with torch.no_grad():
        embedding = network.encode_image(reward.encoder.preprocess(batch().images))  # type: ignore[operator]
    expected = published_formula(embedding, head_state(SMALL))
    torch.testing.assert_close(reward.score(batch()).double(), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.02


def test_the_default_clip_model_is_openais_with_quick_gelu(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    import alignprop_aesthetic.reward as module

    seen: list[Any] = []

    class StopError(Exception):
        pass

    def load_clip(path: Path, architecture: Any, **options: Any) -> Any:
        seen.append((path, architecture, options))
        raise StopError

    monkeypatch.setattr(module, "load_clip", load_clip)
    with pytest.raises(StopError):
        Aesthetic(
            AestheticConfig(weights=str(folder / "head.safetensors"), clip_weights=str(folder / "clip.safetensors"))
        )
    ((path, architecture, options),) = seen
    assert path == folder / "clip.safetensors"
    assert architecture.name == "ViT-L-14"
    assert architecture.config["quick_gelu"] is True
    assert architecture.preprocess.size == 224
    assert options["images_only"] is True


def test_the_gradient_reaches_every_pixel_and_is_the_derivative(
    build: Callable[..., Aesthetic], tmp_path: Path
) -> None:
    relu = tmp_path / "relu.safetensors"
    save_file(head_state(SMALL, RELU), relu, metadata={"config": '{"clip": "starter"}'})
    for options in ({}, {"activation": "relu", "weights": str(relu)}):
        reward = build(**options).double()
        images = (batch(2, 37, 33, torch.float64).images * 0.5 + 0.2).requires_grad_()
        score = reward.score(ImageBatch(images=images))
        assert score.dtype == torch.float64
        (gradient,) = torch.autograd.grad(score.sum(), images)
        assert gradient.isfinite().all()
        assert (gradient[..., 3:-3, :] != 0).all()
        assert torch.autograd.gradcheck(lambda x, r=reward: r.score(ImageBatch(images=x)), (images,), fast_mode=True)
        assert not any(parameter.requires_grad for parameter in reward.parameters())


@pytest.mark.parametrize("size", [1, 5, 64])
def test_scores_are_independent_of_the_batch_and_inputs_are_not_modified(
    size: int, build: Callable[..., Aesthetic]
) -> None:
    reward, given = build(), batch(size)
    kept = given.images.clone()
    together = check_scores("aesthetic", reward.score(given), size, differentiable=False)
    alone = torch.cat([reward.score(given[i : i + 1]) for i in range(size)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(given.images, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_score_in_float32_also_under_autocast(
    dtype: torch.dtype, build: Callable[..., Aesthetic]
) -> None:
    images = batch(dtype=dtype).images.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = build().score(ImageBatch(images=images))
    assert scores.dtype == torch.float32
    exact = build().score(ImageBatch(images=images.detach().float()))
    torch.testing.assert_close(scores.detach(), exact, rtol=1e-5, atol=1e-5)
    scores.sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert (images.grad != 0).any()


@pytest.mark.parametrize("shape", [(32, 32), (32, 300), (257, 33), (512, 512), (31, 65)])
def test_any_size_and_aspect(shape: tuple[int, int], build: Callable[..., Aesthetic]) -> None:
    images = batch(2, *shape).images.requires_grad_()
    check_scores("aesthetic", build().score(ImageBatch(images=images)), 2, differentiable=True).sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            head_state((512, 1024, 128, 64, 16, 1)),
            r"has sizes 512-1024-128-64-16-1; LAION's head for ViT-L/14 has 768-1024",
        ),
        ({**head_state(), "layers.2.weight": torch.zeros(128, 99)}, "do not fit each other"),
        ({**head_state(), "layers.7.bias": torch.zeros(2)}, "do not fit each other"),
        ({k: v for k, v in head_state().items() if k != "layers.4.bias"}, "without 4.bias"),
        ({k: v for k, v in head_state().items() if ".7." not in k}, "its layers are 0, 2, 4, 6; expected"),
        ({"visual.proj": torch.zeros(2)}, "is not an aesthetic head: it contains visual.proj"),
        ({**head_state(), "other.layers.0.weight": torch.zeros(2)}, "is not an aesthetic head"),
        ({"epoch": 3}, "it contains no tensors"),
    ],
)
def test_an_invalid_head_is_one_clear_error(tmp_path: Path, state: dict[str, Any], message: str, folder: Path) -> None:
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(WeightsError, match=message) as caught:
        Aesthetic(AestheticConfig(weights=str(tmp_path / "wrong.pth"), clip_weights=str(folder / "clip.safetensors")))
    assert "wrong.pth" in str(caught.value)


def test_a_head_for_another_clip_model_is_one_clear_error(tmp_path: Path, folder: Path) -> None:
    save_file(head_state((20, *SMALL[1:])), tmp_path / "h.safetensors", metadata={"config": '{"clip": "starter"}'})
    with pytest.raises(
        WeightsError,
        match=r"h\.safetensors takes embeddings of size 20, but the CLIP model .* returns size 16\. Set weights and",
    ):
        Aesthetic(
            AestheticConfig(weights=str(tmp_path / "h.safetensors"), clip_weights=str(folder / "clip.safetensors"))
        )


def test_a_pickled_head_is_refused_and_a_missing_head_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 1)), tmp_path / "pickled.pth")
    with pytest.raises(WeightsError, match="would need unpickling"):
        Aesthetic(AestheticConfig(weights=str(tmp_path / "pickled.pth")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        WeightsError, match=r"sac\+logos\+ava1-l14-linearMSE\.pth .* `alignprop rewards fetch aesthetic`"
    ):
        Aesthetic()
    torch.save(head_state(), tmp_path / "head.pth")
    with pytest.raises(WeightsError, match=r"openai/clip-vit-large-patch14.* `alignprop rewards fetch aesthetic`"):
        Aesthetic(AestheticConfig(weights=str(tmp_path / "head.pth")))
    for clip, command in (("default", "aesthetic"), ("hub:some/clip/model.pt", "hub:some/clip/model.pt")):
        message = rf'of reward "aesthetic" are not .*rewards fetch {command}`.* the option clip_weights: PATH'
        with pytest.raises(WeightsError, match=message):
            Aesthetic(AestheticConfig(weights=str(tmp_path / "head.pth"), clip_weights=clip))
    with pytest.raises(WeightsError, match=r'"nothing".*The option clip_weights takes "default"'):
        Aesthetic(AestheticConfig(weights=str(tmp_path / "head.pth"), clip_weights="nothing"))
    assert HEAD_WEIGHTS.sha256 is not None
    assert HEAD_WEIGHTS.sha256.startswith("21dd590f")


@pytest.mark.parametrize("options", [{"activation": "gelu"}, {"wieghts": "x"}, {"precision": "float16"}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AestheticConfig.model_validate(options)


def test_the_starter_head_selects_its_clip_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tiny_starter_head"
    package.mkdir()
    (package / "__init__.py").write_text("")
    write_tiny_clip(package / "clip.safetensors")
    half = {key: value.half() for key, value in head_state(SMALL).items()}
    save_file(half, package / "head.safetensors", metadata={"config": '{"clip": "starter"}'})
    monkeypatch.syspath_prepend(str(tmp_path))

    class Plugin:
        @hookimpl
        def alignprop_register_weights(self) -> list[WeightsSpec]:
            return [
                WeightsSpec(name="starter", reward=reward, path=f"tiny_starter_head:{file}", summary="tiny")
                for reward, file in (("clip_score", "clip.safetensors"), ("aesthetic", "head.safetensors"))
            ]

    registry = Registry.from_plugins({"alignprop-aesthetic": alignprop_aesthetic, "tiny-starter": Plugin()})
    monkeypatch.setattr("alignprop_core.weights.find.default_registry", lambda: registry)
    reward = registry.load_reward("aesthetic", {"weights": "starter"})
    scores = check_scores("aesthetic", reward.score(batch()), 4, differentiable=False)
    assert scores.std() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_full_size_reward_reaches_the_pixels(precision: Any, tmp_path: Path) -> None:
    from alignprop_clip.architecture import Architecture

    torch.save(random_state(Architecture.from_name("ViT-L-14", quick_gelu=True)), tmp_path / "clip.pt")
    torch.save(head_state(), tmp_path / "head.pth")
    options = {"weights": str(tmp_path / "head.pth"), "clip_weights": str(tmp_path / "clip.pt"), "precision": precision}
    reward = Aesthetic(AestheticConfig(**options)).freeze().cuda()
    images = torch.rand(4, 3, 512, 512, device="cuda", requires_grad=True)
    reward.score(ImageBatch(images=images)).sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert (images.grad != 0).float().mean() > 0.9
