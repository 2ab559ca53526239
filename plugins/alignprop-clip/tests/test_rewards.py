"""The four rewards: scores, gradients, independence of samples, dtypes, sizes, prompts, errors."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

import alignprop_clip
from alignprop_clip.config import ClipScoreConfig, PickScoreConfig, ReferenceSimilarityConfig, SiglipScoreConfig
from alignprop_clip.reference import ReferenceSimilarity, _as_batch
from alignprop_clip.reward import ClipScore, EncoderReward, PickScore, SiglipScore
from alignprop_clip.testing import PROMPTS, random_state, tiny_network, write_tiny_clip
from alignprop_clip.testing import random_batch as batch
from alignprop_core.errors import ConfigError, UserError, WeightsError
from alignprop_core.hookspecs import hookimpl
from alignprop_core.registry.registry import Registry
from alignprop_core.reward import ImageBatch, Reward, check_scores
from alignprop_core.specs import WeightsSpec

NAMES = ["clip_score", "pickscore", "siglip_score", "reference_similarity"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny weights, and reference images of several formats and sizes in "images"."""
    folder = tmp_path_factory.mktemp("clip")
    write_tiny_clip(folder / "clip.safetensors", dtype=torch.float32)
    (folder / "images" / "subfolder").mkdir(parents=True)
    generator = torch.Generator().manual_seed(3)
    for number, (name, size) in enumerate([("a.png", (40, 64)), ("b.JPG", (32, 32)), ("c.webp", (90, 33))]):
        pixels = (torch.rand(*size, 3, generator=generator) * 255).to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "images" / name, "JPEG" if number == 1 else None)
    (folder / "images" / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def build(folder: Path) -> Callable[..., Reward]:
    weights = str(folder / "clip.safetensors")

    def build(name: str, **options: Any) -> Reward:
        if name == "clip_score":
            return ClipScore(ClipScoreConfig(weights=weights, **options)).freeze()
        if name == "pickscore":
            return PickScore(PickScoreConfig(weights=weights, **options)).freeze()
        if name == "siglip_score":
            return SiglipScore(SiglipScoreConfig(weights=weights, **options)).freeze()
        config = ReferenceSimilarityConfig(weights=weights, folder=str(folder / "images"), **options)
        return ReferenceSimilarity(config).freeze()

    return build


def test_the_plugin_is_discovered_and_its_specs_load_without_torch() -> None:
    assert "alignprop_clip" in {point.value for point in entry_points(group="alignprop")}
    code = (
        "import sys, alignprop_clip, alignprop_clip.config\n"
        "print(*(s.name for s in alignprop_clip.alignprop_register_rewards()), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [*NAMES, "False"]


def test_specs_name_the_classes_and_every_option_is_described() -> None:
    rewards = (ClipScore, PickScore, SiglipScore, ReferenceSimilarity)
    for spec, kind in zip(alignprop_clip.alignprop_register_rewards(), rewards, strict=True):
        assert spec.factory == f"{kind.__module__}:{kind.__name__}"
        assert spec.config == f"{kind.Config.__module__}:{kind.Config.__name__}"
        assert spec.needs_prompts is (kind is not ReferenceSimilarity)
        assert all(field.description for field in kind.Config.model_fields.values())
        assert spec.weights
        assert all(file.license for file in spec.weights)


def test_scores_are_open_clips_own(folder: Path, build: Callable[..., Reward]) -> None:
    from alignprop_clip.checkpoint import to_open_clip
    from alignprop_core.weights import load_state_dict

    network = tiny_network()
    network.load_state_dict(to_open_clip(load_state_dict(folder / "clip.safetensors"), "", vocabulary=49408))
    import open_clip

    given = batch()
    reward = build("clip_score")
    assert isinstance(reward, ClipScore)
    with torch.no_grad():
        image, text, scale, bias = network(reward.encoder.preprocess(given.images), open_clip.tokenize(PROMPTS))
    cosines = (image * text).sum(-1)
    exact = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(reward.score(given), cosines, **exact)
    torch.testing.assert_close(build("pickscore").score(given), scale * cosines, **exact)
    torch.testing.assert_close(build("siglip_score").score(given), scale * cosines + bias, **exact)
    log_probability = build("siglip_score", output="log_probability").score(given)
    torch.testing.assert_close(log_probability, F.logsigmoid(scale * cosines + bias), **exact)
    assert cosines.std() > 0.02


def test_reference_similarity_is_the_mean_or_maximum_cosine(folder: Path, build: Callable[..., Reward]) -> None:
    reward = build("reference_similarity")
    assert isinstance(reward, ReferenceSimilarity)
    files = sorted((folder / "images").glob("[abc].*"))
    references = torch.cat([reward.encoder.images(_as_batch(file)) for file in files])
    cosines = reward.encoder.images(batch().images) @ references.T
    assert cosines.shape == (4, 3)
    torch.testing.assert_close(reward.score(batch()), cosines.mean(1))
    torch.testing.assert_close(build("reference_similarity", compare="max").score(batch()), cosines.amax(1))
    itself = ImageBatch(images=_as_batch(files[0]))
    assert build("reference_similarity", compare="max").score(itself).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_reaches_every_pixel_and_is_the_derivative(name: str, build: Callable[..., Reward]) -> None:
    reward = build(name).double()
    for number, prompt in enumerate(PROMPTS[:2]):
        images = (batch(2, 37, 33, torch.float64).images[number : number + 1] * 0.5 + 0.2).requires_grad_()
        score = reward.score(ImageBatch(images=images, prompts=[prompt]))
        assert score.dtype == torch.float64
        (gradient,) = torch.autograd.grad(score.sum(), images)
        assert gradient.isfinite().all()
        assert (gradient[..., 1:-1, 3:-3] != 0).all()
        assert torch.autograd.gradcheck(
            lambda x, prompt=prompt: reward.score(ImageBatch(images=x, prompts=[prompt])), (images,), fast_mode=True
        )
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in reward.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_image_features_are_the_embeddings_behind_the_scores(name: str, build: Callable[..., Reward]) -> None:
    reward = build(name)
    assert isinstance(reward, EncoderReward)
    images = batch().images.requires_grad_()
    features = reward.image_features(images)
    assert (features.shape, features.dtype) == ((4, 16), torch.float32)
    assert reward.image_features(batch(dtype=torch.float64).images).dtype == torch.float64
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    if isinstance(reward, ReferenceSimilarity):
        expected = (features @ reward.references.T).mean(1)
    else:
        expected = (features * reward.encoder.prompts(PROMPTS)).sum(1)
        if name != "clip_score":
            expected = expected * reward.encoder.logit_scale
        if name == "siglip_score":
            expected = expected + (reward.encoder.logit_bias or 0)
    torch.testing.assert_close(reward.score(batch()), expected)
    features[:, 0].sum().backward()
    assert images.grad is not None
    assert images.grad.abs().amax((1, 2, 3)).min() > 0


@pytest.mark.parametrize("name", NAMES)
def test_gradient_ascent_raises_the_score(name: str, build: Callable[..., Reward]) -> None:
    reward, images = build(name), batch().images
    before = reward.score(batch())
    for _ in range(10):
        images = images.detach().requires_grad_()
        score = reward.score(ImageBatch(images=images, prompts=PROMPTS))
        (gradient,) = torch.autograd.grad(score.sum(), images)
        images = (images + 0.01 * gradient.sign()).clamp(0, 1)
    assert (reward.score(ImageBatch(images=images.detach(), prompts=PROMPTS)) > before).all()


@pytest.mark.parametrize("size", [1, 5, 64])
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_independent_of_the_batch_and_inputs_are_not_modified(
    name: str, size: int, build: Callable[..., Reward]
) -> None:
    reward, given = build(name), batch(size)
    kept = given.images.clone()
    together = check_scores(name, reward.score(given), size, differentiable=False)
    alone = torch.cat([reward.score(given[i : i + 1]) for i in range(size)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert torch.equal(given.images, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_images_score_in_float32_also_under_autocast(
    name: str, dtype: torch.dtype, build: Callable[..., Reward]
) -> None:
    reward, given = build(name), batch(dtype=dtype)
    images = given.images.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = reward.score(ImageBatch(images=images, prompts=given.prompts))
    assert scores.dtype == torch.float32
    fresh = build(name)
    exact = fresh.score(ImageBatch(images=given.images.float(), prompts=given.prompts))
    # torch uses another attention kernel when no gradient is required: the last bits differ.
    torch.testing.assert_close(scores.detach(), exact, rtol=1e-5, atol=1e-6)
    scores.sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert (images.grad != 0).any()


@pytest.mark.parametrize("shape", [(32, 32), (32, 300), (257, 33), (512, 512), (31, 65)])
@pytest.mark.parametrize("name", NAMES)
def test_any_size_and_aspect(name: str, shape: tuple[int, int], build: Callable[..., Reward]) -> None:
    images = batch(2, *shape).images.requires_grad_()
    scores = check_scores(
        name, build(name).score(ImageBatch(images=images, prompts=PROMPTS[:2])), 2, differentiable=True
    )
    scores.sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()


def test_bfloat16_precision_is_close_to_float32(build: Callable[..., Reward]) -> None:
    for name in NAMES:
        exact, fast = build(name).score(batch()), build(name, precision="bfloat16").score(batch())
        assert fast.dtype == torch.float32
        assert 0 < (fast - exact).abs().max() < 0.03 * exact.abs().max()


def test_prompts_are_tokenized_once_and_the_cache_is_cleared_when_the_model_moves(
    build: Callable[..., Reward], monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = build("clip_score")
    assert isinstance(reward, ClipScore)
    seen: list[str] = []
    inner = reward.encoder._tokenizer
    assert inner is not None
    monkeypatch.setattr(reward.encoder, "_tokenizer", lambda prompt: seen.append(prompt) or inner(prompt))
    for _ in range(3):
        reward.score(batch(8))
    assert seen == PROMPTS
    reward.double()
    assert reward.score(batch(4, dtype=torch.float64)).dtype == torch.float64
    assert seen == PROMPTS * 2


def test_scoring_in_inference_mode_does_not_break_a_later_backward_pass(build: Callable[..., Reward]) -> None:
    for name in NAMES:
        reward = build(name)
        with torch.inference_mode():
            first = reward.score(batch()).clone()
        images = batch().images.requires_grad_()
        second = reward.score(ImageBatch(images=images, prompts=PROMPTS))
        second.sum().backward()
        assert images.grad is not None
        torch.testing.assert_close(first, second.detach(), rtol=1e-5, atol=1e-6)


def test_a_long_prompt_is_truncated_like_open_clip_with_one_warning(build: Callable[..., Reward]) -> None:
    reward = build("clip_score")
    long = "fox " * 500
    with pytest.warns(UserWarning, match=r"502 tokens .* reads 77.*truncated.*shown once") as caught:
        scores = reward.score(ImageBatch(images=batch().images, prompts=[long, "cat " * 600, "fox " * 75, "fox " * 74]))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fits = reward.score(ImageBatch(images=batch().images[:1], prompts=["fox " * 75]))
    torch.testing.assert_close(scores[:1], fits)


def test_missing_weights_are_reported_with_the_command_that_fetches_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "p").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "p" / "a.png")
    wanted = {
        ClipScore: "openai/clip-vit-large-patch14.* `alignprop rewards fetch clip_score`",
        PickScore: "yuvalkirstain/PickScore_v1.* `alignprop rewards fetch pickscore`",
        SiglipScore: "timm/ViT-B-16-SigLIP.* `alignprop rewards fetch siglip_score`",
    }
    for kind, message in wanted.items():
        with pytest.raises(WeightsError, match=message):
            kind()
    with pytest.raises(WeightsError, match="fetch hub:laion/CLIP-ViT-H-14-laion2B-s32B-b79K/open_clip_pytorch_model"):
        ClipScore(ClipScoreConfig(model="ViT-H-14"))
    with pytest.raises(ConfigError, match="has no default weights for the model ViT-B-16-plus-240"):
        ClipScore(ClipScoreConfig(model="ViT-B-16-plus-240"))
    for model, kind in (("coca_ViT-B-32", "captioning model"), ("roberta-ViT-B-32", "text tower from transformers")):
        with pytest.raises(ConfigError, match=kind):
            ClipScore(ClipScoreConfig(model=model))
    with pytest.raises(
        ConfigError, match=r"has no default weights for the model ViT-L-14\. .* that has defaults: ViT-B-16-Sig"
    ):
        SiglipScore(SiglipScoreConfig(model="ViT-L-14"))
    with pytest.raises(ConfigError, match='Did you mean "ViT-B-32"'):
        ClipScore(ClipScoreConfig(model="ViT-B32"))
    with pytest.raises(WeightsError, match="openai/clip-vit-large-patch14"):
        ReferenceSimilarity(ReferenceSimilarityConfig(folder=str(tmp_path / "p")))


def test_siglip_score_requires_a_logit_bias(tmp_path: Path) -> None:
    path = write_tiny_clip(tmp_path / "plain.safetensors", bias=None)
    with pytest.raises(WeightsError, match=r"no logit_bias.*use clip_score"):
        SiglipScore(SiglipScoreConfig(weights=str(path)))
    assert torch.isfinite(PickScore(PickScoreConfig(weights=str(path))).score(batch())).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "none", "does not exist"),
        (lambda p: _file(p / "file.png", b""), "is a file"),
        (lambda p: _file(p / "empty" / "notes.txt", b"").parent, "contains no images"),
        (lambda p: _file(p / "bad" / "bad.png", b"nothing").parent, r"bad\.png is not a readable image"),
    ],
)
def test_a_folder_without_images_is_one_clear_error(
    make: Callable[[Path], Path], message: str, tmp_path: Path, folder: Path
) -> None:
    config = ReferenceSimilarityConfig(folder=str(make(tmp_path)), weights=str(folder / "clip.safetensors"))
    with pytest.raises(UserError, match=message):
        ReferenceSimilarity(config)


def _file(path: Path, content: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ClipScoreConfig, {"wieghts": "x"}),
        (SiglipScoreConfig, {"output": "probability"}),
        (ReferenceSimilarityConfig, {}),
        (ReferenceSimilarityConfig, {"folder": "", "compare": "mean"}),
        (PickScoreConfig, {"model": "ViT-H-14"}),
    ],
)
def test_wrong_options_are_refused(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        kind.model_validate(options)


def test_a_named_weight_set_is_found_through_the_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like the starter weights: a package with the file, a plugin that registers it, and `weights: starter`."""
    package = tmp_path / "tiny_starter"
    package.mkdir()
    (package / "__init__.py").write_text("")
    write_tiny_clip(package / "clip.safetensors")
    monkeypatch.syspath_prepend(str(tmp_path))

    class Plugin:
        @hookimpl
        def alignprop_register_weights(self) -> list[WeightsSpec]:
            path = "tiny_starter:clip.safetensors"
            return [WeightsSpec(name="starter", reward=name, path=path, summary="tiny") for name in NAMES]

    registry = Registry.from_plugins({"alignprop-clip": alignprop_clip, "tiny-starter": Plugin()})
    monkeypatch.setattr("alignprop_core.weights.find.default_registry", lambda: registry)
    for name in NAMES[:3]:
        reward = registry.load_reward(name, {"weights": "starter"})
        assert reward.score(batch()).shape == (4,)
    with pytest.raises(ConfigError, match="options"):
        registry.load_reward("clip_score", {"weights": "starter", "modle": "x"})
    with pytest.raises(WeightsError, match='Did you mean "starter"'):
        registry.load_reward("clip_score", {"weights": "startr"})


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.* that differ in preprocessing")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("name", "precision"), [("ViT-L-14", "float32"), ("ViT-H-14", "float32"), ("ViT-H-14", "bfloat16")]
)
def test_full_size_models_reach_the_pixels(name: str, precision: Any, tmp_path: Path) -> None:
    from alignprop_clip.architecture import Architecture
    from alignprop_clip.encoder import load_clip

    architecture = Architecture.from_name(name)
    torch.save(random_state(architecture), tmp_path / "clip.pt")
    encoder = load_clip(tmp_path / "clip.pt", architecture, precision=precision).cuda()
    images = torch.rand(4, 3, 512, 512, device="cuda", requires_grad=True)
    cosines = (encoder.images(images) * encoder.prompts(PROMPTS)).sum(-1)
    cosines.sum().backward()
    gradient: Tensor | None = images.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert (gradient != 0).float().mean() > 0.9
