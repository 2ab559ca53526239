"""The rewards: equal to the library's own forward, a gradient at the pixels, one score a sample, clear refusals."""

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
from alignprop_core.registry import default_registry
from alignprop_core.reward import ImageBatch, check_scores

LETTERS = [f"letter {chr(97 + i)}" for i in range(10)]


def random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of timm's smallest network for ten classes of our own."""
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


@pytest.fixture(scope="module", params=alignprop_classifier.OUTSIDE_JUDGES)
def judge(request: pytest.FixtureRequest) -> ImageClassifier:
    built = ImageClassifier(ImageClassifierConfig(model=request.param)).freeze()
    assert isinstance(built, ImageClassifier)
    return built


# -- what is declared -------------------------------------------------------------------------------------------------


def test_the_entry_point_is_the_hook_module() -> None:
    assert "alignprop_classifier" in {point.value for point in entry_points(group="alignprop")}


def test_specs_and_options_load_without_torch() -> None:
    code = (
        "import sys, alignprop_classifier, alignprop_classifier.config, alignprop_classifier.names\n"
        "specs = list(alignprop_classifier.alignprop_register_rewards())\n"
        "print(','.join(s.name for s in specs), 'torch' in sys.modules, 'timm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["image_classifier,classifier_accuracy", "False", "False"]


def test_every_option_is_described_and_the_measure_shares_them() -> None:
    own = ImageClassifierConfig.model_fields
    other = ClassifierAccuracyConfig.model_fields
    assert all(field.description for field in (*own.values(), *other.values()))
    assert set(own) - set(other) == {"temperature", "output"}
    assert set(other) - set(own) == {"top_k"}
    specs = {spec.name: spec for spec in alignprop_classifier.alignprop_register_rewards()}
    assert specs["image_classifier"].evaluate_with == ("classifier_accuracy",)
    assert not specs["classifier_accuracy"].differentiable


def test_options_in_a_run_config_are_checked_strictly() -> None:
    registry = default_registry()
    read = registry.reward_options("image_classifier", {"target": 3, "synonyms": {"a": ["b", 1], "c": "d", "e": 2}})
    assert read.model_dump()["synonyms"] == {"a": ["b", 1], "c": "d", "e": 2}
    for wrong, message in [
        ({"image_size": 16}, "32"),
        ({"std": [1, 0, 1]}, "more than 0"),
        ({"temperature": 0}, "0"),
        ({"crop": 1.5}, "1"),
        ({"modle": "x"}, "model"),
        ({"mean": [0.5]}, "mean"),
    ]:
        with pytest.raises(ConfigError, match=message):
            registry.reward_options("image_classifier", wrong)


# -- the outside judge ------------------------------------------------------------------------------------------------


def photograph(name: str) -> Tensor:
    skimage = pytest.importorskip("skimage")
    with Image.open(Path(skimage.__file__).parent / "data" / name) as file:
        pixels = np.array(file.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def test_the_judge_knows_photographs_it_has_never_seen(judge: ImageClassifier) -> None:
    """Right padding, epsilon, colours and order of tensors: a network loaded wrongly sees nothing here."""
    accuracy = ClassifierAccuracy(ClassifierAccuracyConfig(model=judge.config.model))
    for name, prompt in [("chelsea.png", "two cats"), ("coffee.png", "an espresso")]:
        batch = ImageBatch(images=photograph(name), prompts=[prompt])
        assert accuracy.score(batch).item() == 1, name
        assert judge.score(batch).exp().item() > 0.8, name
    # A rocket on its pad: between a missile and the tower beside it the networks are not sure.
    among_two = ClassifierAccuracy(ClassifierAccuracyConfig(model=judge.config.model, top_k=2))
    assert among_two.score(ImageBatch(images=photograph("rocket.jpg"), prompts=["a missile"])).item() == 1
    cat = ImageBatch(images=photograph("chelsea.png"), prompts=["a cat"])
    assert judge.score(cat).exp().item() > 0.8
    dog = ImageBatch(images=photograph("chelsea.png"), prompts=["a dog"])
    assert accuracy.score(dog).item() == 0


def test_the_judge_is_timms_architecture_with_the_packages_tensors(judge: ImageClassifier) -> None:
    """An independent way: tensors given by their order, and timm's own picture transform."""
    name, side = judge.config.model, judge.image_size
    package, _, file = alignprop_classifier.OUTSIDE_JUDGES[name].file.partition(":")
    network = timm.create_model("tf_" + name.replace("-", "_")).eval()
    assert side == network.pretrained_cfg["input_size"][-1]
    tensors = torch.load(Path(str(resources.files(package))) / file, weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), tensors.values(), strict=True)))
    images = random_images(2, 3, side + 32, side + 32)
    middle = (images[..., 16 : side + 16, 16 : side + 16] * 255 - 127) / 128
    with torch.no_grad():
        expected = network(middle).log_softmax(1)[:, 340]
    scores = judge.score(ImageBatch(images=images, prompts=["zebra", "a zebra"]))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", alignprop_classifier.OUTSIDE_JUDGES)
def test_the_judges_weights_are_those_the_package_carries(name: str) -> None:
    from alignprop_core.weights import find_weights

    weights = alignprop_classifier.OUTSIDE_JUDGES[name]
    path = find_weights("default", reward="image_classifier", default=weights)
    assert path.name.startswith(name)
    assert path.stat().st_size == weights.bytes


def test_climbing_the_score_makes_the_judge_see_it(judge: ImageClassifier) -> None:
    images = torch.full((1, 3, 64, 64), 0.5) + 0.1 * random_images(1, 3, 64, 64)
    batch = ImageBatch(images=images, prompts=["a zebra"])
    before = judge.score(batch).item()
    for _ in range(5):
        images = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(judge.score(ImageBatch(images=images, prompts=["a zebra"])).sum(), images)
        images = (images + gradient.sign() * 4 / 255).clamp(0, 1)
    assert judge.score(ImageBatch(images=images, prompts=["a zebra"])).item() > before + 2


# -- parity with each library's own forward ---------------------------------------------------------------------------


def expected_score(logits: Tensor, index: int) -> Tensor:
    return logits.double().log_softmax(1)[:, index]


def test_timm_equals_its_own_forward_and_transform(tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = timm.create_model("test_vit").eval()
    safetensors.torch.save_file(network.state_dict(), tmp_path / "w.safetensors")
    ours = ImageClassifier(ImageClassifierConfig(model="timm/test_vit", weights=str(tmp_path / "w.safetensors")))
    settings = timm.data.resolve_model_data_config(network)
    transform = timm.data.create_transform(**settings, is_training=False)
    images = random_images(2, 3, 190, 230)
    resize, crop, normalize = transform.transforms[0], transform.transforms[1], transform.transforms[-1]
    seen = torch.stack([normalize(crop(resize(image))) for image in images])
    torch.testing.assert_close(ours.preprocess(images), seen, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        expected = expected_score(network(seen), 291).float()
    scores = ours.freeze().score(ImageBatch(images=images, prompts=["a lion", "lions"]))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_torchvision_equals_its_own_forward_and_transform(tmp_path: Path) -> None:
    torch.manual_seed(2)
    network = torchvision.models.mobilenet_v3_small(weights=None).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "w.pth")
    ours = ImageClassifier(
        ImageClassifierConfig(model="torchvision/mobilenet_v3_small", weights=str(tmp_path / "w.pth"), target="lion")
    )
    images = random_images(2, 3, 300, 280)
    seen = torchvision.models.MobileNet_V3_Small_Weights.DEFAULT.transforms()(images)
    torch.testing.assert_close(ours.preprocess(images), seen, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        expected = expected_score(network(seen), 291).float()
    torch.testing.assert_close(ours.freeze().score(ImageBatch(images=images)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_transformers_equals_its_own_forward_and_processor(tmp_path: Path, kind: str) -> None:
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
    # The shorter side becomes 256, the longer one 287: a margin of 63, 3 more than a multiple of 4.
    shape = (100, 130) if kind == "vit" else (260, 292)
    images = random_images(2, 3, *shape)
    seen = processor(list(images), do_rescale=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours.preprocess(images), seen, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        expected = expected_score(network(pixel_values=ours.preprocess(images)).logits, 2).float()
    scores = ours.freeze().score(ImageBatch(images=images, prompts=["letter c"] * 2))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_a_group_is_worth_its_probabilities_together(tiny: Path) -> None:
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


# -- which class ----------------------------------------------------------------------------------------------------


def test_the_option_comes_before_metadata_and_metadata_before_the_prompt(tiny: Path) -> None:
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


def test_what_names_no_class_is_refused_with_the_nearest(tiny: Path) -> None:
    images = random_images(1, 3, 64, 64)
    ours = reward(tiny)
    for prompt, metadata, message in [
        ("", {}, "The prompt is empty: it names no class"),
        ("a leter of a kind", {}, "names no class"),
        ("letter a", {"class": "leter b"}, r'Metadata key "class": .*no class "leter b"\. Did you mean "letter b"'),
        ("letter a", {"class": 10}, "numbered 0 to 9; there is no 10"),
        ("letter a", {"class": None}, "holds None; it must be the name or number of a class"),
        ("letter a", {"class": True}, "holds True"),
    ]:
        with pytest.raises(PromptError, match=message):
            ours.score(ImageBatch(images=images, prompts=[prompt], metadata=[metadata]))
        with pytest.raises(PromptError, match=message):
            ours.check_prompt(prompt, metadata)  # a run asks before its model loads
    ours.check_prompt("letter a", {})
    reward(tiny, unnamed="ignore").check_prompt("a leter of a kind", {})
    with pytest.raises(ConfigError, match=r'no class "letter z"\. Did you mean "letter a"|no class "letter z"\.'):
        reward(tiny, target="letter z")


def test_ignored_prompts_score_nothing_and_give_no_gradient(tiny: Path) -> None:
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


def test_accuracy_is_the_first_choice_or_one_of_k(tiny: Path) -> None:
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


# -- any picture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["crop", "squash"])
@pytest.mark.parametrize("shape", [(32, 32), (32, 200), (301, 47), (64, 64)])
def test_any_size_and_aspect_with_a_gradient_at_the_pixels(tiny: Path, shape: tuple[int, int], fit: str) -> None:
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
        assert images.grad.any(dim=1).float().mean() > 0.6  # the margins are seen but for what `crop` takes


def test_saturated_pixels_can_learn(tiny: Path) -> None:
    images = torch.ones(1, 3, 64, 64, requires_grad=True)
    reward(tiny, crop=1.0).score(ImageBatch(images=images, prompts=["letter a"])).sum().backward()
    assert images.grad is not None
    assert images.grad.count_nonzero() > 0.9 * images.numel()


@pytest.mark.parametrize("size", [1, 64])
def test_a_samples_score_is_its_own_in_any_batch(tiny: Path, size: int) -> None:
    images = random_images(size, 3, 40, 40)
    prompts = [LETTERS[i % 10] for i in range(size)]
    ours = reward(tiny)
    together = ours.score(ImageBatch(images=images, prompts=prompts))
    picked = list(range(0, size, 17))
    alone = torch.cat([ours.score(ImageBatch(images=images[i : i + 1], prompts=[prompts[i]])) for i in picked])
    torch.testing.assert_close(together[picked], alone, rtol=1e-5, atol=1e-5)
    assert together.shape == (size,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_pictures_score_in_float32(tiny: Path, dtype: torch.dtype) -> None:
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


def test_double_precision_pictures_are_scored_in_double_precision(tiny: Path) -> None:
    ours = reward(tiny, target=1, crop=1.0)
    images = random_images(1, 3, 64, 64).double().requires_grad_()
    scores = ours.score(ImageBatch(images=images))
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores.float(), ours.score(ImageBatch(images=images.float())), rtol=1e-4, atol=1e-4)
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    # The gradient is the slope: a step of 1e-4 along it, on both sides.
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        step = 1e-5
        ahead = ours.score(ImageBatch(images=images + step * direction))
        behind = ours.score(ImageBatch(images=images - step * direction))
    torch.testing.assert_close((ahead - behind) / (2 * step), gradient.norm()[None], rtol=1e-3, atol=1e-8)


# -- weights and models ---------------------------------------------------------------------------------------------


def test_a_file_may_say_itself_what_it_is(tmp_path: Path) -> None:
    network = timm.create_model("test_efficientnet", num_classes=3)
    own = {"model": "timm/test_efficientnet", "classes": ["x", "y", "z"], "image_size": 96, "mean": [0, 0, 0]}
    path = tmp_path / "own.safetensors"
    safetensors.torch.save_file(network.state_dict(), path, metadata={"config": json.dumps(own)})
    ours = ImageClassifier(ImageClassifierConfig(weights=str(path), target="y"))
    assert (ours.image_size, ours.mean, ours.names.names) == (96, [0, 0, 0], ("x", "y", "z"))
    changed = ImageClassifier(ImageClassifierConfig(weights=str(path), target="y", image_size=64))
    assert changed.image_size == 64


def test_classes_from_a_text_file(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("\n".join(LETTERS) + "\n\n")
    assert reward(tiny, classes=str(tmp_path / "classes.txt")).names.names == tuple(LETTERS)
    with pytest.raises(ConfigError, match=r"options\.classes: .* cannot be read"):
        reward(tiny, classes=str(tmp_path / "nothing.txt"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("efficientnet-lite1", 'is no classifier. Did you mean "efficientnet-lite'),
        ("timm/resnet5O", 'timm has no model "resnet5O". Did you mean "resnet50'),
        ("timm/", "Write efficientnet-lite0, efficientnet-lite2, timm/NAME"),
        ("torchvision/resnet5", 'torchvision has no classifier "resnet5". Did you mean "resnet50"?'),
        ("torchvision/raft_large", "torchvision has no classifier"),
        ("transformers/nothing", "neither a folder nor a hub id"),
    ],
)
def test_an_unknown_model_is_named_with_the_nearest(model: str, message: str) -> None:
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
def test_missing_weights_are_named_with_what_fetches_them(
    model: str, messages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(WeightsError) as caught:
        ImageClassifier(ImageClassifierConfig(model=model))
    assert all(message in str(caught.value) for message in messages), str(caught.value)


def test_torchvisions_file_is_held_to_the_checksum_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_weights_that_do_not_fit_say_so(tiny: Path, tmp_path: Path) -> None:
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


def test_a_size_the_network_cannot_take_is_refused_when_it_is_built(tmp_path: Path) -> None:
    import transformers

    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=32)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    ImageClassifier(ImageClassifierConfig(model=f"transformers/{tmp_path}"))
    with pytest.raises(ConfigError, match=r"options\.image_size: .* cannot take pictures of 96 x 96"):
        ImageClassifier(ImageClassifierConfig(model=f"transformers/{tmp_path}", image_size=96))


def test_parameters_are_frozen_and_the_registry_loads_both(tiny: Path) -> None:
    registry = default_registry()
    for name in ("image_classifier", "classifier_accuracy"):
        built = registry.load_reward(name, options(tiny))
        assert not any(parameter.requires_grad for parameter in built.parameters())
        assert not built.training
