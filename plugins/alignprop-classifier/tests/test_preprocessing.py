"""Scores equal those of each library's own pipeline: its preprocessing of a PIL image, and its model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
import transformers
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from alignprop_classifier.config import ImageClassifierConfig
from alignprop_classifier.libraries import _as_published
from alignprop_classifier.preprocessing import TimmTransform
from alignprop_classifier.reward import ImageClassifier
from alignprop_core import cli
from alignprop_core.reward import ImageBatch

LETTERS = [f"letter {chr(97 + i)}" for i in range(10)]
NORMAL = {"image_mean": [0.3, 0.4, 0.5], "image_std": [0.2, 0.3, 0.25]}
VIT = {"image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 64}, **NORMAL}
CLIP = {"image_processor_type": "CLIPImageProcessor", "size": 72, "crop_size": 64, **NORMAL}
CONVNEXT = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 64}, "crop_pct": 0.8}
EFFICIENTNET = {"image_processor_type": "EfficientNetImageProcessor", "size": {"height": 64, "width": 64}}
DONUT = {"image_processor_type": "DonutImageProcessor", "size": {"height": 64, "width": 80}}


def photograph(width: int = 150, height: int = 110) -> Image.Image:
    """Return an image with smooth regions, edges and some noise."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    pixels = np.array(coarse).astype(int) + rng.integers(-20, 20, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (250, 30, 60)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def sharpen(network: nn.Module) -> None:
    """Scale up the weights of a random network, so that wrong pixels give different log-probabilities."""
    head = [module for module in network.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
    with torch.no_grad():
        head.weight.mul_(10)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network for images of any size and scale."""
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    config: Any = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], id2label=dict(enumerate(LETTERS))
    )
    network = transformers.ResNetForImageClassification(config)
    sharpen(network)
    network.save_pretrained(folder)
    return folder


def scores(folder: Path, image: Image.Image, backend: str | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the 10 log-probabilities that alignprop gives an image, and those of transformers."""
    ours = ImageClassifier(ImageClassifierConfig(model=f"transformers/{folder}", target=0, **options)).freeze()
    assert isinstance(ours, ImageClassifier)
    processor: Any = transformers.AutoImageProcessor.from_pretrained(folder, backend=backend)
    network: Any = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        found = ours.logits(tensor(image)).log_softmax(1)[0]
        expected = network(**processor(image, return_tensors="pt")).logits.log_softmax(1)[0]
    return found, expected


def preset(folder: Path, values: dict[str, Any]) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


KEYS = [
    (VIT, {"do_normalize": False}),
    (VIT, {"do_rescale": False, "image_std": [60, 70, 80], "image_mean": [120, 110, 100]}),
    (EFFICIENTNET, {"include_top": False}),
    (VIT, {"resample": 3, "size": {"height": 48, "width": 80}}),
    (CLIP, {"size": {"shortest_edge": 80}}),
    (CONVNEXT, {"resample": 0}),
]
MORE_KEYS = [
    (VIT, {}),
    (VIT, {"rescale_factor": 0.01}),
    *((VIT, {"resample": resample}) for resample in (0, 1)),
    (VIT, {"size": 80}),
    (VIT, {"do_resize": False}),
    (VIT, {"do_pad": True, "pad_size": {"height": 80, "width": 90}}),
    (VIT, {"do_center_crop": True, "crop_size": {"height": 40, "width": 60}}),
    (VIT, {"do_convert_rgb": True, "do_reduce_labels": True} | {"image_processor_type": "BeitImageProcessor"}),
    (VIT, {"image_mean": 0.4, "image_std": 0.3}),
    (VIT, {"image_processor_type": None, "feature_extractor_type": "ViTFeatureExtractor"}),
    (VIT, {"image_processor_type": "ViTImageProcessorFast", "device": "cpu", "disable_grouping": True}),
    (CLIP, {}),
    (CLIP, {"do_center_crop": False}),
    (CLIP, {"crop_size": {"height": 160, "width": 200}}),
    (CLIP, {"size": {"shortest_edge": 60, "longest_edge": 70}}),
    (CLIP, {"size": {"max_height": 60, "max_width": 70}, "image_processor_type": "ViTImageProcessor"}),
    (CONVNEXT, {}),
    (CONVNEXT, {"crop_pct": 0.5}),
    (CONVNEXT, {"size": {"shortest_edge": 400}}),
    (EFFICIENTNET, {}),
    (EFFICIENTNET, {"rescale_offset": True}),
    (EFFICIENTNET, {"do_normalize": False}),
    (DONUT, {}),
    (DONUT, {"do_thumbnail": False, "do_align_long_axis": True}),
    ({"image_processor_type": "MobileViTImageProcessor", "size": 80, "crop_size": 64}, {}),
    (
        {"image_processor_type": "MobileViTImageProcessor", "size": 80, "crop_size": 64},
        {"do_flip_channel_order": False},
    ),
    ({"image_processor_type": "LevitImageProcessor", "size": 64, "crop_size": 64}, {}),
    ({"image_processor_type": "PoolFormerImageProcessor", "size": 64, "crop_size": 64}, {"crop_pct": 0.7}),
    ({"image_processor_type": "TextNetImageProcessor", "size": {"shortest_edge": 70}, "crop_size": 64}, {}),
    ({"image_processor_type": "PPLCNetImageProcessor"}, {"resize_short": 80, "crop_size": 64}),
]


@pytest.mark.parametrize(
    ("base", "changes"), [*KEYS, *(pytest.param(*row, marks=pytest.mark.slow) for row in MORE_KEYS)]
)
def test_every_key_has_the_effect_that_it_has_in_transformers(
    resnet: Path, base: dict[str, Any], changes: dict[str, Any]
) -> None:
    found, expected = scores(preset(resnet, base | changes), photograph())
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    if changes and "image_processor_type" not in changes:
        other, _ = scores(preset(resnet, base), photograph())
        assert (other - expected).abs().max() > 0.1  # so an ignored key would fail


@pytest.mark.parametrize("resample", [1, 4, 5])
def test_filters_without_a_tensor_version_are_pillows(resnet: Path, resample: int) -> None:
    folder = preset(resnet, VIT | {"resample": resample, "do_rescale": False, "do_normalize": False})
    ours = ImageClassifier(ImageClassifierConfig(model=f"transformers/{folder}", target=0))
    processor: Any = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    image = photograph()
    expected = processor(image, return_tensors="pt")["pixel_values"].float()
    assert (ours.preprocess(tensor(image)) - expected).abs().mean() < 0.6  # of 255: Pillow rounds both passes


def test_options_change_the_processor(resnet: Path) -> None:
    given = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.4), "interpolation": "bicubic", "image_size": 96}
    found, _ = scores(preset(resnet, CLIP), photograph(), **given)
    changed = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.4], "resample": 3, "size": 108, "crop_size": 96}
    _, expected = scores(preset(resnet, CLIP | changed), photograph())
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    found, _ = scores(preset(resnet, CLIP), photograph(), fit="squash", crop=1.0)
    _, expected = scores(preset(resnet, VIT | {"resample": 3}), photograph())
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


def test_float64_images_and_gradients_pass_the_processor(resnet: Path) -> None:
    ours = ImageClassifier(ImageClassifierConfig(model=f"transformers/{preset(resnet, CLIP)}", target=1)).freeze()
    # No flat regions: where pixels are equal, the maximum of a pooling layer has no derivative.
    image = torch.rand(1, 3, 90, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    score = ours.score(ImageBatch(images=image))
    (gradient,) = torch.autograd.grad(score.sum(), image)
    step = 1e-6 * gradient / gradient.norm()
    with torch.no_grad():
        rise = ours.score(ImageBatch(images=image + step)) - ours.score(ImageBatch(images=image - step))
    torch.testing.assert_close(rise / 2e-6, gradient.norm()[None], rtol=1e-4, atol=0)


@pytest.mark.slow
def test_every_processor_of_an_image_classifier_equals_transformers(resnet: Path) -> None:
    """With its class defaults, which most files of the hub only repeat."""
    compared = set()
    for model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        name = (IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}).get("torchvision")
        if name in (None, "ImageGPTImageProcessor", "Siglip2ImageProcessor") or name in compared:
            continue  # the two do not return images: of color clusters and of patches
        compared.add(name)
        found, expected = scores(preset(resnet, {"image_processor_type": name}), photograph(330, 260))
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02, msg=lambda text, name=name: f"{name}: {text}")
    assert len(compared) > 12


SMALL: dict[str, dict[str, Any]] = {
    "vit": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    "deit": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    "beit": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    "data2vec-vision": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    "dinov2": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 1},
    "vit_msn": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    "convnext": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "convnextv2": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "regnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8},
    "bit": {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "num_groups": 8},
    "swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]},
    "swinv2": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "mobilevit": {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16]},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
    "poolformer": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "segformer": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
    "levit": {
        "hidden_sizes": [32, 32, 32],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
        "num_attention_heads": [2, 2, 2],
    },
    "focalnet": {"embed_dim": 16, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3]},
}


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=[] if name == "vit" else pytest.mark.slow) for name in SMALL]
)
def test_small_transformers_models_with_their_own_processor(tmp_path: Path, model_type: str) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, id2label=dict(enumerate(LETTERS)), **SMALL[model_type])
    kinds = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[model_type]
    kind = kinds if isinstance(kinds, str) else kinds[-1]  # of two, the one with a distillation token
    network: Any = getattr(transformers, kind)(config)
    sharpen(network)
    network.save_pretrained(tmp_path)
    name = IMAGE_PROCESSOR_MAPPING_NAMES[model_type]["torchvision"]
    getattr(transformers, name)().save_pretrained(tmp_path)
    found, expected = scores(tmp_path, photograph(300, 260))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


# -- timm -------------------------------------------------------------------------------------------------------------


def test_timm_repositories_are_read_with_timms_data_config(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=10)
    sharpen(network)
    own = {**network.pretrained_cfg, "mean": [0.3, 0.4, 0.5], "interpolation": "bilinear", "crop_pct": 0.8}
    own = {key: value for key, value in own.items() if isinstance(value, (str, int, float, list, tuple))}
    config = {"architecture": "test_vit", "num_classes": 10, "label_names": LETTERS, "pretrained_cfg": own}
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(network.state_dict(), tmp_path / "model.safetensors")
    found, expected = scores(tmp_path, photograph(230, 200), backend="pil")
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


def timm_configs() -> Iterator[dict[str, Any]]:
    """Yield the distinct data configs of timm's published weights."""
    seen = []
    for name in timm.list_pretrained():
        config = resolve_data_config(timm.get_pretrained_cfg(name).to_dict())
        if config not in seen:
            seen.append(config)
            yield config


def check_timm(config: dict[str, Any], image: Image.Image) -> None:
    expected: Any = create_transform(**config, is_training=False)(image)
    found = TimmTransform(config)(tensor(image))[0]
    scale = 1 / (255 * min(config["std"]))  # of one gray level: timm resizes 8-bit images
    assert found.shape == expected.shape == config["input_size"], config
    assert (found - expected).abs().mean() < scale, config


def test_timms_transform_for_each_kind_of_data_config() -> None:
    image = photograph(120, 100)
    base = {"interpolation": "bicubic", "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.2)}
    for config in (
        {"input_size": (3, 64, 64), "crop_pct": 0.9, "crop_mode": "center", **base},
        {"input_size": (3, 64, 96), "crop_pct": 1.0, "crop_mode": "center", **base, "interpolation": "bilinear"},
        {"input_size": (3, 64, 64), "crop_pct": 0.8, "crop_mode": "squash", **base},
        {"input_size": (3, 64, 64), "crop_pct": 1.0, "crop_mode": "border", **base},
    ):
        check_timm(config, image)


@pytest.mark.slow
def test_timms_transform_for_the_data_config_of_all_published_weights() -> None:
    image, count = photograph(250, 200), 0
    for config in timm_configs():
        check_timm(config, image)
        count += 1
    assert count > 50


# -- torchvision ------------------------------------------------------------------------------------------------------


def test_the_preprocessing_of_all_torchvision_weights_equals_their_transforms() -> None:
    images = tensor(photograph())
    seen = []
    for name in torchvision.models.list_models(module=torchvision.models):
        for weights in torchvision.models.get_model_weights(name):
            _, ours = _as_published(name, weights, {}, {})
            if ours in seen:
                continue
            seen.append(ours)
            expected = weights.transforms()(images)
            torch.testing.assert_close(ours(images), expected, rtol=1e-5, atol=1e-5, msg=lambda _, w=weights: str(w))
    assert len(seen) > 10


def torchvision_scores(name: str, weights: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of alignprop and of torchvision, which builds the network for its own weights.

    torchvision gets a tensor: random networks are sensitive to the rounding of PIL images.
    """
    monkeypatch.setenv("TORCH_HOME", str(folder))
    file = folder / "hub" / "checkpoints" / weights.url.rpartition("/")[2]
    ours = ImageClassifier(ImageClassifierConfig(model=f"torchvision/{name}", weights=str(file), target=0)).freeze()
    assert isinstance(ours, ImageClassifier)
    network = torchvision.models.get_model(name, weights=weights).eval()
    image = tensor(photograph())
    with torch.no_grad():
        found = ours.logits(image).log_softmax(1)[0]
        expected = network(weights.transforms()(image)).log_softmax(1)[0]
    return found, expected


def write_torchvision(name: str, weights: Any, folder: Path, **arguments: Any) -> nn.Module:
    """Write random weights where torchvision keeps its own."""
    torch.manual_seed(0)
    network: nn.Module = torchvision.models.get_model(name, weights=None, **arguments)
    if name == "googlenet":  # with the initial weights alone, every image gives the same logits
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.get_buffer("running_var").mul_(0.2)
    file = folder / "hub" / "checkpoints" / weights.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save(network.state_dict(), file)
    return network


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_with_transform_input_are_built_as_torchvisions(name: str) -> None:
    weights = torchvision.models.get_model_weights(name).DEFAULT
    with torch.device("meta"):
        tensors = torchvision.models.get_model(name, weights=None, init_weights=False).state_dict()
        for own in (tensors, {key: value for key, value in tensors.items() if not key.lower().startswith("aux")}):
            arguments, _ = _as_published(name, weights, own, {})
            network = torchvision.models.get_model(name, weights=None, **arguments)
            network.load_state_dict(own, assign=True)
            assert network.transform_input


@pytest.mark.slow
def test_googlenet_changes_the_scale_of_its_input_as_torchvisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = torchvision.models.GoogLeNet_Weights.DEFAULT
    network = write_torchvision("googlenet", weights, tmp_path, init_weights=False)
    found, expected = torchvision_scores("googlenet", weights, tmp_path, monkeypatch)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    with torch.no_grad():  # transform_input is not set
        other = network.eval()(weights.transforms()(photograph())[None]).log_softmax(1)[0]
    assert (other - expected).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "version", "arguments"),
    [
        ("inception_v3", "DEFAULT", {"init_weights": False}),
        ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1", {"image_size": 384}),
        ("vit_b_16", "IMAGENET1K_V1", {}),
        ("resnet50", "IMAGENET1K_V1", {}),
        ("resnet50", "IMAGENET1K_V2", {}),
        ("maxvit_t", "DEFAULT", {"input_size": (224, 224)}),
        ("swin_t", "DEFAULT", {}),
        ("efficientnet_b1", "DEFAULT", {}),
        ("convnext_tiny", "DEFAULT", {}),
        ("squeezenet1_1", "DEFAULT", {}),
        ("mobilenet_v3_small", "DEFAULT", {}),
    ],
)
def test_torchvision_models_equal_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, version: str, arguments: dict[str, Any]
) -> None:
    weights = getattr(torchvision.models.get_model_weights(name), version)
    write_torchvision(name, weights, tmp_path, **arguments)
    found, expected = torchvision_scores(name, weights, tmp_path, monkeypatch)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


def test_vision_transformers_of_torchvision_have_the_size_of_their_weights() -> None:
    weights = torchvision.models.ViT_H_14_Weights.DEFAULT
    with torch.device("meta"):
        tensors = torchvision.models.vit_h_14(image_size=518).state_dict()
        arguments, preprocessing = _as_published("vit_h_14", weights, tensors, {})
        torchvision.models.vit_h_14(**arguments).load_state_dict(tensors, assign=True)
    assert preprocessing.size == (518, 518)
    smaller, preprocessing = _as_published(
        "vit_h_14", weights, tensors | {"encoder.pos_embedding": torch.empty(1, 257, 1280)}, {}
    )
    assert (smaller["image_size"], preprocessing.size) == (224, (224, 224))


# -- rewards show -----------------------------------------------------------------------------------------------------


def test_rewards_show_prints_the_preprocessing(resnet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["rewards", "show", "image_classifier", "--options", f"model=transformers/{preset(resnet, CLIP)}"]
    assert cli.run([*arguments, "-o", "target=1"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "preprocessing: resize shortest_edge 72, bicubic, antialiased" in out
    assert "preprocessing: crop center, 64 x 64" in out
    assert "preprocessing: mean (0.3, 0.4, 0.5)" in out
