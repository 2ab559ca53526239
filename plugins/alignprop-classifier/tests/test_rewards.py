"""The rewards: parity with each library's forward pass, gradients, independence of samples, clear errors."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from importlib import resources
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor

import alignprop_classifier
from alignprop_classifier.config import ClassifierAccuracyConfig, ImageClassifierConfig
from alignprop_classifier.reward import ClassifierAccuracy, ImageClassifier
from alignprop_core.errors import ConfigError, PromptError, WeightsError
from alignprop_core.registry.registry import default_registry
from alignprop_core.reward import ImageBatch, check_scores

LETTERS = [f"letter {chr(97 + i)}" for i in range(10)]


def random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of timm's smallest network with ten custom classes."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    torch.manual_seed(0)
    safetensors.torch.save_file(timm.create_model("test_efficientnet", num_classes=10).state_dict(), path)
    return path


def options(tiny: Path, **more: Any) -> dict[str, Any]:
    return {"model": "timm/test_efficientnet", "weights": str(tiny), "classes": LETTERS, "image_size": 64, **more}


def reward(tiny: Path, **more: Any) -> ImageClassifier:
    built = ImageClassifier(ImageClassifierConfig(**options(tiny, **more))).freeze()
    assert isinstance(built, ImageClassifier)
    return built


@pytest.fixture(scope="module", params=alignprop_classifier.EFFICIENTNET_LITE)
def efficientnet(request: pytest.FixtureRequest) -> ImageClassifier:
    built = ImageClassifier(ImageClassifierConfig(model=request.param)).freeze()
    assert isinstance(built, ImageClassifier)
    return built


# -- specs and options ------------------------------------------------------------------------------------------------


def test_the_entry_point_is_the_hook_module() -> None:
    assert "alignprop_classifier" in {point.value for point in entry_points(group="alignprop")}


def test_specs_and_options_load_without_torch() -> None:
    code = (
        "import sys, alignprop_classifier, alignprop_classifier.config, alignprop_classifier.class_names\n"
        "specs = list(alignprop_classifier.alignprop_register_rewards())\n"
        "print(','.join(s.name for s in specs), 'torch' in sys.modules, 'timm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["image_classifier,classifier_accuracy", "False", "False"]


def test_every_option_is_described_and_both_rewards_share_them() -> None:
    fields = ImageClassifierConfig.model_fields
    accuracy_fields = ClassifierAccuracyConfig.model_fields
    assert all(field.description for field in (*fields.values(), *accuracy_fields.values()))
    assert set(fields) - set(accuracy_fields) == {"temperature", "output"}
    assert set(accuracy_fields) - set(fields) == {"top_k"}
    specs = {spec.name: spec for spec in alignprop_classifier.alignprop_register_rewards()}
    assert specs["image_classifier"].evaluate_with == ("classifier_accuracy",)
    assert not specs["classifier_accuracy"].differentiable


def test_options_in_a_run_config_are_checked_strictly() -> None:
    registry = default_registry()
    options = registry.reward_options("image_classifier", {"target": 3, "synonyms": {"a": ["b", 1], "c": "d", "e": 2}})
    assert options.model_dump()["synonyms"] == {"a": ["b", 1], "c": "d", "e": 2}
    for invalid, message in [
        ({"image_size": 16}, "32"),
        ({"std": [1, 0, 1]}, "greater than 0"),
        ({"temperature": 0}, "0"),
        ({"crop": 1.5}, "1"),
        ({"modle": "x"}, "model"),
        ({"mean": [0.5]}, "mean"),
    ]:
        with pytest.raises(ConfigError, match=message):
            registry.reward_options("image_classifier", invalid)


# -- EfficientNet-Lite ------------------------------------------------------------------------------------------------


def photograph(name: str) -> Tensor:
    skimage = pytest.importorskip("skimage")
    with Image.open(Path(skimage.__file__).parent / "data" / name) as file:
        pixels = np.array(file.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def test_efficientnet_lite_classifies_unseen_photographs(efficientnet: ImageClassifier) -> None:
    """Checks padding, batch norm epsilon, channel order and tensor order: with any of them wrong this fails."""
    accuracy = ClassifierAccuracy(ClassifierAccuracyConfig(model=efficientnet.config.model))
    for name, prompt in [("chelsea.png", "two cats"), ("coffee.png", "an espresso")]:
        batch = ImageBatch(images=photograph(name), prompts=[prompt])
        assert accuracy.score(batch).item() == 1, name
        assert efficientnet.score(batch).exp().item() > 0.8, name
    # A rocket on its launch pad: the networks are not sure between the missile and the tower beside it.
    top_2 = ClassifierAccuracy(ClassifierAccuracyConfig(model=efficientnet.config.model, top_k=2))
    assert top_2.score(ImageBatch(images=photograph("rocket.jpg"), prompts=["a missile"])).item() == 1
    cat = ImageBatch(images=photograph("chelsea.png"), prompts=["a cat"])
    assert efficientnet.score(cat).exp().item() > 0.8
    dog = ImageBatch(images=photograph("chelsea.png"), prompts=["a dog"])
    assert accuracy.score(dog).item() == 0


def test_efficientnet_lite_is_timms_architecture_with_the_packages_tensors(efficientnet: ImageClassifier) -> None:
    """Independent reference: tensors assigned in order, and the preprocessing written out."""
    name, side = efficientnet.config.model, efficientnet.preprocess.size[0]
    package, _, file = alignprop_classifier.EFFICIENTNET_LITE[name].file.partition(":")
    network = timm.create_model("tf_" + name.replace("-", "_")).eval()
    assert side == network.pretrained_cfg["input_size"][-1]
    tensors = torch.load(Path(str(resources.files(package))) / file, weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), tensors.values(), strict=True)))
    images = random_images(2, 3, side + 32, side + 32)
    cropped = (images[..., 16 : side + 16, 16 : side + 16] * 255 - 127) / 128
    with torch.no_grad():
        expected = network(cropped).log_softmax(1)[:, 340]
    scores = efficientnet.score(ImageBatch(images=images, prompts=["zebra", "a zebra"]))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", alignprop_classifier.EFFICIENTNET_LITE)
def test_efficientnet_lite_weights_are_those_of_the_package(name: str) -> None:
    from alignprop_core.weights import find_weights

    weights = alignprop_classifier.EFFICIENTNET_LITE[name]
    path = find_weights("default", reward="image_classifier", default=weights)
    assert path.name.startswith(name)
    assert path.stat().st_size == weights.bytes


def test_gradient_ascent_raises_the_score_of_efficientnet_lite(efficientnet: ImageClassifier) -> None:
    images = torch.full((1, 3, 64, 64), 0.5) + 0.1 * random_images(1, 3, 64, 64)
    batch = ImageBatch(images=images, prompts=["a zebra"])
    before = efficientnet.score(batch).item()
    for _ in range(5):
        images = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(
            efficientnet.score(ImageBatch(images=images, prompts=["a zebra"])).sum(), images
        )
        images = (images + gradient.sign() * 4 / 255).clamp(0, 1)
    assert efficientnet.score(ImageBatch(images=images, prompts=["a zebra"])).item() > before + 2


# -- parity with each library's forward pass --------------------------------------------------------------------------


def expected_score(logits: Tensor, index: int) -> Tensor:
    return logits.double().log_softmax(1)[:, index]


def test_timm_models_equal_timms_forward_and_transform(tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = timm.create_model("test_vit").eval()
    safetensors.torch.save_file(network.state_dict(), tmp_path / "w.safetensors")
    ours = ImageClassifier(ImageClassifierConfig(model="timm/test_vit", weights=str(tmp_path / "w.safetensors")))
    settings = timm.data.resolve_model_data_config(network)
    transform = timm.data.create_transform(**settings, is_training=False)
    images = random_images(2, 3, 190, 230)
    resize, crop, normalize = transform.transforms[0], transform.transforms[1], transform.transforms[-1]
    inputs = torch.stack([normalize(crop(resize(image))) for image in images])
    torch.testing.assert_close(ours.preprocess(images), inputs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        expected = expected_score(network(inputs), 291).float()
    scores = ours.freeze().score(ImageBatch(images=images, prompts=["a lion", "lions"]))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_torchvision_models_equal_torchvisions_forward_and_transform(tmp_path: Path) -> None:
    torch.manual_seed(2)
    network = torchvision.models.mobilenet_v3_small(weights=None).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "w.pth")
    ours = ImageClassifier(
        ImageClassifierConfig(model="torchvision/mobilenet_v3_small", weights=str(tmp_path / "w.pth"), target="lion")
    )
    images = random_images(2, 3, 300, 280)
    inputs = torchvision.models.MobileNet_V3_Small_Weights.DEFAULT.transforms()(images)
    torch.testing.assert_close(ours.preprocess(images), inputs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        expected = expected_score(network(inputs), 291).float()
    torch.testing.assert_close(ours.freeze().score(ImageBatch(images=images)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_transformers_models_equal_transformers_forward_and_processor(tmp_path: Path, kind: str) -> None:
    import transformers

    labels = dict(enumerate(LETTERS))
    torch.manual_seed(3)
    if kind == "vit":
        config: Any = transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=48,
            patch_size=16, id2label=labels,
        )  # fmt: skip
        network: Any = transformers.ViTForImageClassification(config).eval()
        processor: Any = transformers.ViTImageProcessor(size={"height": 48, "width": 48})
    else:
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], id2label=labels)
        network = transformers.ResNetForImageClassification(config).eval()
        processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875)
    network.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    ours = ImageClassifier(ImageClassifierConfig(model=f"transformers/{tmp_path}"))
    # The shorter side becomes 256, the longer side 287: a crop margin of 63, which is 3 mod 4.
    shape = (100, 130) if kind == "vit" else (260, 292)
    images = random_images(2, 3, *shape)
    inputs = processor(list(images), do_rescale=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours.preprocess(images), inputs, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        expected = expected_score(network(pixel_values=ours.preprocess(images)).logits, 2).float()
    scores = ours.freeze().score(ImageBatch(images=images, prompts=["letter c"] * 2))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_the_probabilities_of_a_group_are_summed(tiny: Path) -> None:
    images = random_images(3, 3, 64, 64)
    ours = reward(tiny, crop=1.0, synonyms={"vowel": ["letter a", "letter e", 8]})
    with torch.no_grad():
        p = ours.logits(images).double().softmax(1)[:, [0, 4, 8]].sum(1)
    batch = ImageBatch(images=images, prompts=["two vowels"] * 3)
    torch.testing.assert_close(ours.score(batch), p.log().float(), rtol=1e-5, atol=1e-5)
    plain = reward(tiny, crop=1.0, synonyms={"vowel": ["letter a", "letter e", 8]}, output="probability")
    torch.testing.assert_close(plain.score(batch), p.float(), rtol=1e-5, atol=1e-6)
    soft = reward(tiny, crop=1.0, target=4, temperature=2.0)
    with torch.no_grad():
        expected = (ours.logits(images) / 2).log_softmax(1)[:, 4]
    torch.testing.assert_close(soft.score(batch), expected)


# -- target class ---------------------------------------------------------------------------------------------------


def test_the_option_overrides_metadata_and_metadata_overrides_the_prompt(tiny: Path) -> None:
    images = random_images(1, 3, 64, 64).expand(4, -1, -1, -1)
    batch = ImageBatch(
        images=images,
        prompts=["letter a", "letter a", "a letter d", ""],
        metadata=[{}, {"class": "letter b"}, {}, {"class": 2}],
    )
    ours = reward(tiny)
    with torch.no_grad():
        p = ours.logits(images).log_softmax(1)[0]
    torch.testing.assert_close(ours.score(batch), p[[0, 1, 3, 2]])
    torch.testing.assert_close(reward(tiny, target="letter e").score(batch), p[[4, 4, 4, 4]])
    torch.testing.assert_close(reward(tiny, metadata_key="none").score(batch[:3]), p[[0, 0, 3]])


def test_a_prompt_or_metadata_without_a_class_is_refused_with_the_nearest_name(tiny: Path) -> None:
    images = random_images(1, 3, 64, 64)
    ours = reward(tiny)
    for prompt, metadata, message in [
        ("", {}, "The prompt is empty: it names no class"),
        ("a leter of a kind", {}, "names no class"),
        ("letter a", {"class": "leter b"}, r'Metadata key "class": .*no class "leter b"\. Did you mean "letter b"'),
        ("letter a", {"class": 10}, "There is no class 10: .* numbered 0 to 9"),
        ("letter a", {"class": None}, "is None; it must be the name or index of a class"),
        ("letter a", {"class": True}, "is True; it must be"),
    ]:
        with pytest.raises(PromptError, match=message):
            ours.score(ImageBatch(images=images, prompts=[prompt], metadata=[metadata]))
        with pytest.raises(PromptError, match=message):
            ours.check_prompt(prompt, metadata)  # a run checks prompts before it loads the model
    ours.check_prompt("letter a", {})
    reward(tiny, unnamed="ignore").check_prompt("a leter of a kind", {})
    with pytest.raises(ConfigError, match=r'no class "letter z"\. Did you mean "letter a"|no class "letter z"\.'):
        reward(tiny, target="letter z")


def test_ignored_prompts_score_zero_without_gradient(tiny: Path) -> None:
    images = random_images(3, 3, 64, 64).requires_grad_()
    batch = ImageBatch(images=images, prompts=["", "letter b", "a dog"])
    scores = check_scores("c", reward(tiny, unnamed="ignore").score(batch), 3, differentiable=True)
    assert scores[0] == scores[2] == 0
    assert scores[1] < 0
    scores.sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert [bool(g.any()) for g in images.grad] == [False, True, False]
    accuracy = ClassifierAccuracy(ClassifierAccuracyConfig(**options(tiny, unnamed="ignore", top_k=10)))
    assert accuracy.score(batch).tolist() == [0, 1, 0]


def test_accuracy_counts_the_top_k_classes(tiny: Path) -> None:
    images = random_images(5, 3, 64, 64)
    with torch.no_grad():
        order = reward(tiny).logits(images).argsort(dim=1, descending=True)
    for place in range(10):
        metadata = [{"class": int(row[place])} for row in order]
        for k in (1, 3, 50):
            accuracy = ClassifierAccuracy(ClassifierAccuracyConfig(**options(tiny, top_k=k)))
            scores = check_scores(
                "a", accuracy.score(ImageBatch(images=images, metadata=metadata)), 5, differentiable=False
            )
            assert scores.tolist() == [float(place < k)] * 5
        if place == 3:
            break


# -- any image --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["crop", "squash"])
@pytest.mark.parametrize("shape", [(32, 32), (32, 200), (301, 47), (64, 64)])
def test_any_size_and_aspect_ratio_with_a_gradient_to_the_pixels(tiny: Path, shape: tuple[int, int], fit: str) -> None:
    images = random_images(2, 3, *shape).requires_grad_()
    before = images.detach().clone()
    batch = ImageBatch(images=images, prompts=["letter a", "letter b"])
    scores = check_scores("c", reward(tiny, fit=fit).score(batch), 2, differentiable=True)
    scores.sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert (images.grad.flatten(1).norm(dim=1) > 0).all()
    assert torch.equal(images.detach(), before)
    if fit == "squash":
        assert images.grad.any(dim=1).float().mean() > 0.6  # the margins count, except for what `crop` removes


def test_saturated_pixels_get_a_gradient(tiny: Path) -> None:
    images = torch.ones(1, 3, 64, 64, requires_grad=True)
    reward(tiny, crop=1.0).score(ImageBatch(images=images, prompts=["letter a"])).sum().backward()
    assert images.grad is not None
    assert images.grad.count_nonzero() > 0.9 * images.numel()


@pytest.mark.parametrize("size", [1, 64])
def test_scores_are_independent_of_the_batch(tiny: Path, size: int) -> None:
    images = random_images(size, 3, 40, 40)
    prompts = [LETTERS[i % 10] for i in range(size)]
    ours = reward(tiny)
    together = ours.score(ImageBatch(images=images, prompts=prompts))
    selected = list(range(0, size, 17))
    alone = torch.cat([ours.score(ImageBatch(images=images[i : i + 1], prompts=[prompts[i]])) for i in selected])
    torch.testing.assert_close(together[selected], alone, rtol=1e-5, atol=1e-5)
    assert together.shape == (size,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_score_in_float32(tiny: Path, dtype: torch.dtype) -> None:
    images = random_images(2, 3, 48, 48).to(dtype).requires_grad_()
    ours = reward(tiny, target=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = ours.score(ImageBatch(images=images))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, ours.score(ImageBatch(images=images.float())), rtol=0, atol=0)
    scores.sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert images.grad.any()


def test_float64_images_are_scored_in_float64(tiny: Path) -> None:
    ours = reward(tiny, target=1, crop=1.0)
    images = random_images(1, 3, 64, 64).double().requires_grad_()
    scores = ours.score(ImageBatch(images=images))
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores.float(), ours.score(ImageBatch(images=images.float())), rtol=1e-4, atol=1e-4)
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    # Central finite difference along the gradient.
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        step = 1e-5
        ahead = ours.score(ImageBatch(images=images + step * direction))
        behind = ours.score(ImageBatch(images=images - step * direction))
    torch.testing.assert_close((ahead - behind) / (2 * step), gradient.norm()[None], rtol=1e-3, atol=1e-8)


# -- weights and models ---------------------------------------------------------------------------------------------


def test_a_weights_file_may_store_model_classes_and_preprocessing(tmp_path: Path) -> None:
    network = timm.create_model("test_efficientnet", num_classes=3)
    header = {"model": "timm/test_efficientnet", "classes": ["x", "y", "z"], "image_size": 96, "mean": [0, 0, 0]}
    path = tmp_path / "own.safetensors"
    safetensors.torch.save_file(network.state_dict(), path, metadata={"config": json.dumps(header)})
    ours = ImageClassifier(ImageClassifierConfig(weights=str(path), target="y"))
    described = ours.describe_preprocessing()
    assert (described["input_size"], described["mean"]) == ((3, 96, 96), (0, 0, 0))
    assert ours.names.names == ("x", "y", "z")
    changed = ImageClassifier(ImageClassifierConfig(weights=str(path), target="y", image_size=64))
    assert changed.preprocess.size == (64, 64)


def test_classes_from_a_text_file(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("\n".join(LETTERS) + "\n\n")
    assert reward(tiny, classes=str(tmp_path / "classes.txt")).names.names == tuple(LETTERS)
    with pytest.raises(ConfigError, match=r"options\.classes: .* cannot be read"):
        reward(tiny, classes=str(tmp_path / "nothing.txt"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("efficientnet-lite1", 'is not a classifier. Did you mean "efficientnet-lite'),
        ("timm/resnet5O", 'timm has no model "resnet5O". Did you mean "resnet50'),
        ("timm/", "Use efficientnet-lite0, efficientnet-lite2, timm/NAME"),
        ("torchvision/resnet5", 'torchvision has no classifier "resnet5". Did you mean "resnet50"?'),
        ("torchvision/raft_large", "torchvision has no classifier"),
        ("transformers/nothing", "neither a folder nor a hub id"),
    ],
)
def test_an_unknown_model_is_reported_with_the_nearest_name(model: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ImageClassifier(ImageClassifierConfig(model=model))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("model", "messages"),
    [
        ("timm/resnet18.a1_in1k", ["model.safetensors of repository timm/resnet18.a1_in1k", "rewards fetch hub:timm/"]),
        ("torchvision/resnet18", ["resnet18-f37072fd.pth", "https://download.pytorch.org/", "weights: PATH"]),
        ("transformers/google/vit-base-patch16-224", ["config.json of repository google/vit-base-patch16-224"]),
    ],
)
def test_missing_weights_are_reported_with_the_command_that_fetches_them(
    model: str, messages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(WeightsError) as caught:
        ImageClassifier(ImageClassifierConfig(model=model))
    assert all(message in str(caught.value) for message in messages), str(caught.value)


def test_torchvisions_file_is_verified_against_the_checksum_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half a file")
    with pytest.raises(WeightsError, match="is damaged: its sha256 does not start with f37072fd"):
        ImageClassifier(ImageClassifierConfig(model="torchvision/resnet18"))


def test_timms_weights_come_from_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--timm--test_efficientnet.r160_in1k"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    network = timm.create_model("test_efficientnet")
    safetensors.torch.save_file(network.state_dict(), folder / "snapshots" / "abc" / "model.safetensors")
    ours = ImageClassifier(ImageClassifierConfig(model="timm/test_efficientnet", target="red fox"))
    assert ours.names.find("red fox").indices == (277,)


def test_weights_of_another_architecture_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"does not fit timm/test_efficientnet: .*size mismatch.*options.classes"):
        reward(tiny, classes=LETTERS[:9])
    with pytest.raises(WeightsError, match=r"does not fit timm/test_vit: .*options.model"):
        reward(tiny, model="timm/test_vit")
    with pytest.raises(WeightsError, match="does not fit efficientnet-lite0"):
        ImageClassifier(ImageClassifierConfig(weights=str(tiny)))
    (tmp_path / "w.pt").write_bytes(pickle.dumps({"a": Path}))
    with pytest.raises(WeightsError, match="would need unpickling"):
        reward(tmp_path / "w.pt")
    with pytest.raises(ConfigError, match="at least two classes"):
        reward(tiny, classes=["one"])


def test_an_image_size_the_network_does_not_accept_is_refused_on_loading(tmp_path: Path) -> None:
    import transformers

    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=32)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    processor: Any = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    ImageClassifier(ImageClassifierConfig(model=f"transformers/{tmp_path}"))
    with pytest.raises(ConfigError, match=r"options\.image_size: .* does not accept images of 96 x 96"):
        ImageClassifier(ImageClassifierConfig(model=f"transformers/{tmp_path}", image_size=96))


def test_parameters_are_frozen_and_the_registry_loads_both(tiny: Path) -> None:
    registry = default_registry()
    for name in ("image_classifier", "classifier_accuracy"):
        built = registry.load_reward(name, options(tiny))
        assert not any(parameter.requires_grad for parameter in built.parameters())
        assert not built.training
