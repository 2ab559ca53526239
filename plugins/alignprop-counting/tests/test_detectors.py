"""RT-DETR and DETR agree with transformers, their gradient is the derivative, their files load without unpickling."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    RTDetrConfig,
    RTDetrImageProcessor,
)

from alignprop_core.errors import ConfigError, PluginError, WeightsError
from alignprop_core.registry.registry import Registry, default_registry
from alignprop_counting.coco import COCO_NAMES, DETR_NAMES
from alignprop_counting.config import DetectorConfig
from alignprop_counting.loading import load_detector, transformers_detector
from alignprop_counting.processors import read_processor
from alignprop_counting.testing import check_detector, check_gradient_is_the_derivative, random_images
from alignprop_counting.transformers_detector import RtDetr, TransformersDetector


def load(name: str, weights: dict[str, Path], **options: Any) -> Any:
    return load_detector(DetectorConfig(detector=name, weights=str(weights[name]), **options), default_registry())


def processor(name: str) -> Any:
    if name == "rtdetr":
        return RTDetrImageProcessor(size={"height": 64, "width": 64})
    return DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 106}, do_pad=False)


def test_the_detector_checks_pass(name: str, weights: dict[str, Path]) -> None:
    check_detector(load(name, weights))


@pytest.mark.parametrize(("height", "width"), [(48, 80), (64, 64), (200, 40)])
def test_predictions_are_those_of_transformers(
    name: str, weights: dict[str, Path], height: int, width: int, tiny: SimpleNamespace
) -> None:
    detector = load(name, weights)
    images = (random_images(2, height, width) * 255).round().to(torch.uint8)
    original = tiny.build[name]()
    original.load_state_dict(load_file(weights[name]))
    # Frozen as the detector is: it decides which product of matrices PyTorch chooses, and so the last bits.
    original.requires_grad_(False).eval()
    process = processor(name)
    pixels = process(images=list(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        outputs = original(pixel_values=pixels)
        found = detector(images.float() / 255)
    # The original resizes bytes, and rounds while it does: up to one level apart.
    assert torch.allclose(detector.preprocess(images.float() / 255), pixels, atol=1.1 / 255 / 0.224)
    # From the same pixels the outputs are equal.
    same = detector.outputs(pixels)
    assert torch.equal(same.logits, outputs.logits)
    assert torch.equal(same.pred_boxes, outputs.pred_boxes)
    if (height, width) == (64, 64):
        expected = outputs.logits.sigmoid() if name == "rtdetr" else outputs.logits.softmax(-1)[..., :-1]
        assert torch.allclose(found.probabilities, expected, rtol=1e-5, atol=1e-9)
        for threshold in (0.1, 0.3, 0.5):
            results = process.post_process_object_detection(
                outputs, threshold=threshold, target_sizes=[(height, width)] * 2
            )
            hard = detector.detect(found, threshold)
            for i, result in enumerate(results):
                kept = hard.classes[i] >= 0
                order = result["scores"].argsort(descending=True, stable=True)
                assert torch.allclose(hard.scores[i][kept], result["scores"][order], rtol=1e-5)
                assert hard.classes[i][kept].tolist() == result["labels"][order].tolist()
                assert torch.allclose(hard.boxes[i][kept], result["boxes"][order], atol=1e-2)


def test_the_check_finds_the_detached_path_of_the_original(
    weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = load("rtdetr", weights)
    check_gradient_is_the_derivative(detector)
    monkeypatch.setattr(RtDetr, "outputs", TransformersDetector.outputs)
    with pytest.raises(AssertionError, match="part of it is detached"):
        check_gradient_is_the_derivative(detector)


def test_a_saturated_softmax_stays_finite(weights: dict[str, Path]) -> None:
    detector = load("detr", weights)
    with torch.no_grad():
        detector.model.class_labels_classifier.weight.mul_(1e3)
    images = random_images(1).float().requires_grad_()
    found = detector(images)
    assert found.probabilities.max() > 0.9999
    (gradient,) = torch.autograd.grad(found.log_odds.sum(), images)
    assert gradient.isfinite().all()


def test_float16_files_are_computed_in_float32(tmp_path: Path, weights: dict[str, Path], tiny: SimpleNamespace) -> None:
    file = tiny.write(tiny.lively(tiny.rtdetr()).half(), tmp_path / "half.safetensors")
    detector = transformers_detector("rtdetr", file, None)
    assert {p.dtype for p in detector.parameters()} == {torch.float32}


def test_the_header_gives_architecture_names_and_size(
    name: str, weights: dict[str, Path], tiny: SimpleNamespace
) -> None:
    detector = load(name, weights)
    assert detector.names == tiny.names
    assert detector.image_size == 64
    assert load(name, weights, image_size=96).image_size == 96
    assert not any(p.requires_grad for p in detector.parameters())
    assert not detector.training


def test_config_json_in_the_same_folder_gives_the_architecture(tmp_path: Path, tiny: SimpleNamespace) -> None:
    model = tiny.lively(tiny.rtdetr())
    save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    model.config.architectures = ["RTDetrForObjectDetection"]
    (tmp_path / "config.json").write_text(model.config.to_json_string())
    detector = transformers_detector("rtdetr", tmp_path / "model.safetensors", None)
    assert detector.names == tiny.names
    assert detector.image_size == 640


# -- preprocessor_config.json ------------------------------------------------------------------------------------------

MEANS = {"image_mean": [0.2, 0.3, 0.6], "image_std": [0.3, 0.2, 0.2]}


def folder_of(name: str, folder: Path, tiny: SimpleNamespace, preset: dict[str, Any]) -> Path:
    """Write a folder as on the hub: config.json, model.safetensors and preprocessor_config.json."""
    torch.manual_seed(0)
    model = tiny.lively(tiny.build[name]())
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preset))
    return folder / "model.safetensors"


PRESETS: list[tuple[str, dict[str, Any]]] = [
    ("rtdetr", {"size": {"height": 96, "width": 64}, "do_normalize": True, **MEANS}),
    ("detr", {"feature_extractor_type": "DetrFeatureExtractor", "size": 64, "max_size": 80, **MEANS}),
]
MORE_PRESETS: list[tuple[str, dict[str, Any]]] = [
    ("rtdetr", {"size": {"height": 64, "width": 64}, "do_rescale": False, "do_normalize": True, "resample": 3}),
    ("rtdetr", {"size": {"height": 64, "width": 64}, "do_pad": True, "pad_size": {"height": 96, "width": 128}}),
    ("rtdetr", {"do_resize": False, "format": "coco_detection"}),
    ("detr", {"size": {"shortest_edge": 48, "longest_edge": 60}, "do_normalize": False, "do_pad": False}),
    ("detr", {"size": {"shortest_edge": 64, "longest_edge": 90}, "pad_size": {"height": 100, "width": 120}}),
    ("detr", {"size": {"max_height": 64, "max_width": 70}, "rescale_factor": 0.006, "resample": 0}),
]


@pytest.mark.parametrize(
    ("kind", "preset"), [*PRESETS, *(pytest.param(*row, marks=pytest.mark.slow) for row in MORE_PRESETS)]
)
def test_a_folders_preprocessing_is_that_of_transformers(
    kind: str, preset: dict[str, Any], tmp_path: Path, tiny: SimpleNamespace
) -> None:
    detector = transformers_detector(kind, folder_of(kind, tmp_path, tiny, preset), None).eval()
    process: Any = AutoImageProcessor.from_pretrained(tmp_path)
    model: Any = AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    images = (random_images(1, 96, 128) * 255).round()

    def best(logits: torch.Tensor) -> torch.Tensor:
        p = logits.sigmoid() if kind == "rtdetr" else logits.softmax(-1)[..., :-1]
        return p.amax(-1).sort().values

    with torch.no_grad():
        found = detector(images.float() / 255).probabilities.amax(-1).sort().values
        expected = best(model(**process(images=list(images.float()), return_tensors="pt")).logits)
        assert torch.allclose(found, expected, rtol=0, atol=1e-4)
        if "pad_size" not in preset and preset.get("do_rescale", True):  # else the network is sensitive to rounding
            rounded = best(model(**process(images=list(images.to(torch.uint8)), return_tensors="pt")).logits)
            assert torch.allclose(found, rounded, rtol=0, atol=0.005)
    assert detector.describe_preprocessing()["image processor"] == type(process).__name__


def test_the_image_size_overrides_that_of_a_folder(tmp_path: Path, tiny: SimpleNamespace) -> None:
    file = folder_of("rtdetr", tmp_path, tiny, {"size": {"height": 96, "width": 96}, "do_normalize": True})
    assert transformers_detector("rtdetr", file, None).image_size == 96
    detector: Any = transformers_detector("rtdetr", file, 64)
    assert detector.image_size == 64
    assert detector.preprocess(random_images(1).float()).shape == (1, 3, 64, 64)
    assert detector.describe_preprocessing()["mean"] == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ({"do_normalise": True}, 'do_normalise: RTDetrImageProcessor has no such key. Did you mean "do_normalize"'),
        ({"crop_pct": 0.9}, "crop_pct: RTDetrImageProcessor has no such key"),
        ({"do_resize": "no"}, "do_resize: must be true or false"),
        ({"resample": 1}, "resample: detectors resize with filter 0"),
        ({"size": {"height": 5, "depth": 3}}, "transformers cannot prepare images with this file"),
        ({"image_processor_type": "Nothing"}, "Unrecognized image processor"),
    ],
)
def test_an_invalid_preprocessor_config_is_one_message(preset: dict[str, Any], message: str, tmp_path: Path) -> None:
    RTDetrConfig().save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(preset))
    with pytest.raises(WeightsError, match=f"^{re.escape(str(file))}: .*{message}"):
        read_processor(file)


# -- wrong files and names ---------------------------------------------------------------------------------------------


def test_a_file_of_the_other_architecture_names_the_detector(weights: dict[str, Path]) -> None:
    with pytest.raises(WeightsError, match='contains a DetrForObjectDetection; write "detector: detr"'):
        transformers_detector("rtdetr", weights["detr"], None)


def test_a_head_of_the_wrong_size_is_one_clear_error(tmp_path: Path, tiny: SimpleNamespace) -> None:
    model = tiny.rtdetr()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    key = "model.decoder.class_embed.0.weight"
    state[key] = state[key][:3].clone()
    header = {"architecture": "RTDetrForObjectDetection", "config": json.loads(model.config.to_json_string())}
    save_file(state, tmp_path / "w.safetensors", {"config": json.dumps({"transformers": header})})
    with pytest.raises(WeightsError, match=r"does not match .*class_embed.0.weight is \(3, 32\), not \(5, 32\)"):
        transformers_detector("rtdetr", tmp_path / "w.safetensors", None)


@pytest.mark.parametrize(
    ("size", "reason"),
    [*((size, "Sizes of tensors must match") for size in (33, 48, 50, 100, 150)), (32, "out of range")],
)
def test_an_unsupported_image_size_is_refused_when_the_detector_loads(
    size: int, reason: str, tmp_path: Path, tiny: SimpleNamespace, weights: dict[str, Path]
) -> None:
    file = weights["rtdetr"]
    if size == 32:  # 21 locations
        file = tiny.write(tiny.rtdetr(num_queries=30), tmp_path / "w.safetensors")
    with pytest.raises(ConfigError) as caught:
        load_detector(DetectorConfig(weights=str(file), image_size=size), default_registry())
    assert f"options.image_size: the detector rtdetr does not support images of {size} x {size}" in str(caught.value)
    assert f"Use a multiple of 32 from {64 if size == 32 else 32}." in str(caught.value)
    assert reason in str(caught.value)
    # DETR supports all of these sizes.
    load_detector(DetectorConfig(detector="detr", weights=str(weights["detr"]), image_size=size), default_registry())


def test_the_image_size_of_a_file_is_checked_too(tmp_path: Path, tiny: SimpleNamespace) -> None:
    file = tiny.write(tiny.lively(tiny.rtdetr()), tmp_path / "w.safetensors", 100)
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(file))}: image_size: .* Use a multiple of 32 from 32"):
        load_detector(DetectorConfig(weights=str(file)), default_registry())


def test_the_smallest_allowed_size_is_the_smallest_that_works(tmp_path: Path, tiny: SimpleNamespace) -> None:
    for queries in (20, 21, 22, 84, 85):
        file = tiny.write(tiny.rtdetr(num_queries=queries), tmp_path / "w.safetensors")
        least = int(transformers_detector("rtdetr", file, None).allowed_sizes.rpartition(" ")[2])
        load_detector(DetectorConfig(weights=str(file), image_size=least), default_registry())
        if least > 32:
            with pytest.raises(ConfigError, match="out of range"):
                load_detector(DetectorConfig(weights=str(file), image_size=least - 32), default_registry())


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ({"transformers": {}}, "transformers.architecture: field required"),
        ({"transformers": {"architecture": "RTDetrForObjectDetection"}}, "transformers.config: field required"),
        ({"transformers": {"architecture": 3, "config": {}}}, "transformers.architecture: input should be .*it is 3"),
        ({"transformers": "x"}, "transformers: "),
        ({"image_size": "big"}, "image_size: input should be a valid integer"),
        ({"image_size": 5}, "image_size: input should be greater than or equal to 32"),
        (
            {"transformers": {"architecture": "RTDetrForObjectDetection", "config": {"d_model": "x"}}},
            "(its configuration is not a RTDetrConfig|no RTDetrForObjectDetection can be built)",
        ),
        (
            {"transformers": {"architecture": "RTDetrForObjectDetection", "config": {"d_model": -3}}},
            "no RTDetrForObjectDetection can be built from its configuration",
        ),
    ],
)
def test_a_broken_header_is_one_message(tmp_path: Path, header: dict[str, Any], key: str) -> None:
    file = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(1)}, file, {"config": json.dumps(header)})
    with pytest.raises(WeightsError, match=f"^{re.escape(str(file))}: (its header: )?{key}"):
        transformers_detector("rtdetr", file, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{bad", "cannot be read as JSON"),
        ("[]", "contains a list; it must be a mapping"),
        ("{}", "architectures: field required"),
        ('{"architectures": "RTDetrForObjectDetection"}', "architectures: input should be a valid list"),
        ('{"architectures": []}', "architectures: list should have at least 1 item"),
        ('{"architectures": ["Other"]}', "contains a Other; this plugin supports"),
        ('{"architectures": ["RTDetrForObjectDetection"], "d_model": "x"}', "its configuration is not a RTDetrConfig"),
    ],
)
def test_a_broken_config_json_is_one_message(tmp_path: Path, text: str, message: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=f"^{re.escape(str(tmp_path / 'config.json'))}: .*{message}"):
        transformers_detector("rtdetr", tmp_path / "model.safetensors", None)


def test_a_file_without_a_header_must_be_the_full_size(tmp_path: Path, tiny: SimpleNamespace) -> None:
    save_file({k: v.clone() for k, v in tiny.rtdetr().state_dict().items()}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"does not match .* and \d+ more\. The configuration is"):
        transformers_detector("rtdetr", tmp_path / "w.safetensors", None)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    header = {"transformers": {"architecture": "YolosForObjectDetection", "config": {}}}
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors", {"config": json.dumps(header)})
    with pytest.raises(WeightsError, match="contains a YolosForObjectDetection; this plugin supports"):
        transformers_detector("rtdetr", tmp_path / "w.safetensors", None)


def test_a_pickle_is_refused(tmp_path: Path, tiny: SimpleNamespace) -> None:
    torch.save({"model": tiny.rtdetr()}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="would need unpickling"):
        load_detector(DetectorConfig(weights=str(tmp_path / "w.pt")), default_registry())


def test_missing_default_weights_name_repository_file_and_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, repository in (("rtdetr", "PekingU/rtdetr_r50vd"), ("detr", "facebook/detr-resnet-50")):
        with pytest.raises(WeightsError) as caught:
            load_detector(DetectorConfig(detector=name), default_registry())
        assert f'The weights of detector "{name}" are not on this machine' in str(caught.value)
        assert f"file model.safetensors of repository {repository}" in str(caught.value)
        assert f"`alignprop rewards fetch hub:{repository}/model.safetensors`" in str(caught.value)


def test_an_unknown_detector_gets_the_nearest_name() -> None:
    with pytest.raises(
        PluginError, match=r'no plugin offers|No installed plugin offers the detector "rtdtr".*"rtdetr"'
    ):
        load_detector(DetectorConfig(detector="rtdtr"), default_registry())
    import alignprop_counting

    alone = Registry.from_plugins({"alignprop-counting": alignprop_counting})
    with pytest.raises(PluginError, match="YOLO comes with `pip install alignprop-ultralytics`"):
        load_detector(DetectorConfig(detector="yolo11n"), alone)


def test_a_detector_of_two_plugins_is_chosen_by_distribution(weights: dict[str, Path], tiny: SimpleNamespace) -> None:
    import alignprop_counting

    class Other:
        alignprop_detectors_of_transformers = staticmethod(alignprop_counting.alignprop_detectors_of_transformers)

    both = Registry.from_plugins({"alignprop-counting": alignprop_counting, "other-detectors": Other()})
    file = str(weights["rtdetr"])
    with pytest.raises(PluginError, match="is offered by alignprop-counting 0 and other-detectors 0"):
        load_detector(DetectorConfig(weights=file), both)
    chosen = load_detector(DetectorConfig(detector="alignprop-counting/rtdetr", weights=file), both)
    assert chosen.names == tiny.names


# -- full size ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("full", ["rtdetr", "detr"])
def test_full_size_networks_give_finite_gradients_at_the_pixels(full: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from transformers import RTDetrForObjectDetection

    torch.manual_seed(0)
    if full == "rtdetr":
        model: Any = RTDetrForObjectDetection(RTDetrConfig(id2label=dict(enumerate(COCO_NAMES))))
        detector: TransformersDetector = RtDetr(model)
    else:
        pytest.importorskip("timm", reason="DETR's backbone comes from timm")
        from alignprop_counting.transformers_detector import Detr

        model = DetrForObjectDetection(DetrConfig(id2label=dict(enumerate(DETR_NAMES))))
        # Untrained, timm's residual branches end in a zero, and then most locations of a feature map have no effect.
        for name, value in model.state_dict().items():
            if name.endswith("bn3.weight"):
                value.fill_(1)
        detector = Detr(model)
    detector = detector.cuda().eval().requires_grad_(False)
    images = torch.rand(2, 3, 512, 512, device="cuda", requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(6):  # the first chooses kernels
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        (gradient,) = torch.autograd.grad(detector(images).log_odds.amax(1).sum(), images)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    seconds = sorted(times[1:])[2] / 1000
    print(f"| {full} | {seconds:.4f} | {torch.cuda.max_memory_allocated() / 2**30:.2f} |")
    assert gradient.isfinite().all()
    assert (gradient != 0).float().mean() > 0.9
