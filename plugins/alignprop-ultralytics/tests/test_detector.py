"""Scores, boxes and detections equal those of ultralytics, and both heads have a gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alignprop_counting.detector import suppress
from alignprop_counting.testing import check_detector, random_images
from alignprop_ultralytics.detector import PADDING, Yolo
from alignprop_ultralytics.offline import DetectionModel, yaml_model_load

NAMES = ("cat", "dog", "fox", "bird", "traffic light")
Network = Callable[[str], Any]


def crowd(objects: int, copies: int) -> tuple[Tensor, Tensor]:
    """Return boxes (1, A, 4) on a grid, several for each object, and their scores (1, A)."""
    corners = torch.stack([40.0 * (torch.arange(objects) % 40), 40.0 * (torch.arange(objects) // 40)], 1)
    corners = corners.repeat_interleave(copies, 0) + torch.rand(objects * copies, 2)
    # All boxes of an object score higher than those of the next, so a limit before suppression loses whole objects.
    scores = 0.9 - 0.3 * torch.arange(objects)[:, None] / objects - 1e-5 * torch.arange(copies)
    return torch.cat([corners, corners + 30], 1)[None], scores.reshape(1, -1)


@pytest.mark.parametrize(("objects", "copies"), [(30, 12), (310, 3)])
def test_suppression_starts_from_all_boxes_as_in_ultralytics(objects: int, copies: int) -> None:
    from ultralytics.utils.nms import non_max_suppression

    torch.manual_seed(0)
    boxes, scores = crowd(objects, copies)
    found = suppress(boxes, scores, torch.zeros_like(scores, dtype=torch.long), 0.5, 0.5)
    count = found.count(torch.tensor([0]), torch.tensor([0])).item()
    center, size = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    prediction = torch.cat([center, size, scores[..., None]], 2).transpose(1, 2)  # (B, 4 + C, A)
    (expected,) = non_max_suppression(prediction, conf_thres=0.5, iou_thres=0.5, max_time_img=10.0)
    assert count == len(expected) == min(objects, 300)
    kept = found.classes[0] >= 0
    torch.testing.assert_close(found.boxes[0][kept], expected[:, :4], rtol=0, atol=1e-3)


def test_it_passes_the_detector_checks(head: tuple[str, bool], network: Network) -> None:
    name, one_to_one = head
    check_detector(Yolo(network(name), NAMES, 64, one_to_one))


def test_scores_and_boxes_equal_those_of_ultralytics(head: tuple[str, bool], network: Network) -> None:
    name, one_to_one = head
    model = network(name)
    detector = Yolo(model, NAMES, 64, one_to_one)
    pixels, _, _ = detector.preprocess(random_images(3, 64, 96).float())
    logits, boxes = detector.head(detector.features(pixels), one_to_one=one_to_one)
    model.end2end = False
    try:
        with torch.no_grad():
            prediction, raw = model(pixels)
    finally:
        model.end2end = one_to_one or name in ("yolo26n", "yolov10n")
    if one_to_one:
        expected = raw["one2one"]["scores"].sigmoid()
    else:
        expected = prediction[:, 4:]
        centre, size = prediction[:, :2], prediction[:, 2:4]
        corners = torch.cat([centre - size / 2, centre + size / 2], 1).transpose(1, 2)
        assert torch.allclose(boxes, corners, rtol=1e-5, atol=1e-4)
    assert torch.allclose(logits.sigmoid(), expected, rtol=1e-5, atol=0)
    assert expected.std() > 0.05


def test_detections_equal_those_of_ultralytics(head: tuple[str, bool], network: Network) -> None:
    from ultralytics.utils.nms import non_max_suppression

    name, one_to_one = head
    model = network(name)
    detector = Yolo(model, NAMES, 64, one_to_one)
    images = random_images(3, 64, 64).float()
    with torch.no_grad():
        found = detector(images)
        model.end2end = one_to_one
        prediction, _ = model(images)
    scores = found.probabilities.amax(-1)
    for threshold in (float(scores.median()), float(scores.quantile(0.95))):
        hard = detector.detect(found, threshold, 0.45)
        # Ultralytics has a time limit per image and drops the rest; this one is never reached.
        results = non_max_suppression(
            prediction, conf_thres=threshold, iou_thres=0.45, end2end=one_to_one, max_time_img=10.0, max_det=300
        )
        for i, result in enumerate(results):
            kept = hard.classes[i] >= 0
            order = result[:, 4].argsort(descending=True, stable=True)
            assert torch.allclose(hard.scores[i][kept], result[order, 4], rtol=1e-5)
            assert hard.classes[i][kept].tolist() == result[order, 5].long().tolist()
            assert torch.allclose(hard.boxes[i][kept], result[order, :4], atol=1e-3)
    model.end2end = name in ("yolo26n", "yolov10n")


@pytest.mark.parametrize("name", ["yolov10n", "yolo26n"])
def test_predict_uses_our_head_with_nms_false_and_the_other_head_by_default(
    name: str, network: Network, tmp_path: Path
) -> None:
    from ultralytics import YOLO

    image = (random_images(1, 64, 64)[0] * 255).round().to(torch.uint8)
    for one_to_one, options in ((True, {"nms": False}), (False, {})):
        yolo = YOLO(f"{name}.yaml")  # a new one each time: it keeps the head it chose first
        yolo.model = network(name)
        (result,) = yolo.predict(
            image.permute(1, 2, 0).numpy()[..., ::-1].copy(),  # BGR, as in OpenCV
            conf=1e-4, iou=0.7, imgsz=64, device="cpu", project=str(tmp_path), verbose=False, **options,
        )  # fmt: skip
        detector = Yolo(network(name), NAMES, 64, one_to_one)
        with torch.no_grad():
            hard = detector.detect(detector(image[None].float() / 255), 1e-4, 0.7)
        kept = hard.classes[0] >= 0
        assert kept.sum() > 20
        # Its layers are fused and ours are not, so results differ by rounding.
        assert torch.allclose(hard.scores[0][kept], result.boxes.conf, rtol=0, atol=1e-5)
        assert hard.classes[0][kept].tolist() == result.boxes.cls.long().tolist()
        assert torch.allclose(hard.boxes[0][kept].clamp(0, 64), result.boxes.xyxy, atol=1e-3)


@pytest.mark.parametrize(
    ("height", "width"), [(64, 64), (48, 80), (200, 90), (37, 120), (32, 32), (640, 480), (33, 1000)]
)
def test_the_letterbox_equals_that_of_ultralytics(height: int, width: int, network: Network) -> None:
    from ultralytics.data.augment import LetterBox

    detector = Yolo(network("yolo11n"), NAMES, 128)
    images = (random_images(1, height, width) * 255).round()
    pixels, scale, (left, top) = detector.preprocess(images.float() / 255)
    array = images[0].permute(1, 2, 0).numpy().astype(np.uint8)
    original = LetterBox((128, 128), auto=True, stride=32)(image=array)
    assert pixels.shape[-2:] == original.shape[:2]
    # OpenCV resizes 8-bit images in fixed point.
    found = (pixels[0].permute(1, 2, 0) * 255).numpy()
    assert np.abs(found - original.astype(np.float32)).max() < 1.1
    assert scale == pytest.approx(min(128 / height, 128 / width))
    if top:
        assert torch.allclose(pixels[:, :, :top], torch.tensor(PADDING))
    if left:
        assert torch.allclose(pixels[..., :left], torch.tensor(PADDING))


def test_boxes_are_in_the_pixels_of_the_image(network: Network) -> None:
    detector = Yolo(network("yolo11n"), NAMES, 64)
    small = random_images(1, 32, 48).float()
    large = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear")
    with torch.no_grad():
        boxes, doubled = detector(small).boxes, detector(large).boxes
    assert torch.allclose(2 * boxes, doubled, atol=0.5)


def test_the_one_to_one_head_is_the_default_if_there_is_one(network: Network) -> None:
    assert [Yolo(network(name), NAMES).one_to_one for name in ("yolov8n", "yolov10n", "yolo11n", "yolo26n")] == [
        False,
        True,
        False,
        True,
    ]
    with pytest.raises(ValueError, match="no one-to-one head"):
        Yolo(network("yolo11n"), NAMES, one_to_one=True)


def test_the_one_to_one_head_has_a_gradient_in_training_mode_unlike_in_ultralytics(tiny: SimpleNamespace) -> None:
    model = tiny.build("yolo26n")
    images = random_images(2, 64, 64).float().requires_grad_()
    model.train()
    assert torch.autograd.grad(model(images)["one2one"]["scores"].sum(), images, allow_unused=True) == (None,)
    detector = Yolo(model, NAMES, 64).train()
    (gradient,) = torch.autograd.grad(detector(images).log_odds.sum(), images)
    assert (gradient != 0).float().mean() > 0.99


def test_a_prediction_in_inference_mode_does_not_break_a_later_gradient(tiny: SimpleNamespace) -> None:
    model = tiny.build("yolo26n")
    with torch.inference_mode():
        model(torch.rand(1, 3, 64, 64))
    images = random_images(1, 64, 64).float().requires_grad_()
    (gradient,) = torch.autograd.grad(Yolo(model, NAMES, 64)(images).log_odds.sum(), images)
    assert gradient.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["yolov8n", "yolo11n", "yolo26n"])
def test_full_size_networks_give_finite_gradients_at_the_pixels(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    model = DetectionModel(yaml_model_load(f"{name}.yaml"), nc=80, verbose=False)
    detector = Yolo(model, tuple(map(str, range(80)))).cuda().eval().requires_grad_(False)
    images = torch.rand(2, 3, 512, 512, device="cuda", requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(6):  # the first call selects kernels
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        found = detector(images)
        (gradient,) = torch.autograd.grad(found.log_odds.sum(), images)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    seconds = sorted(times[1:])[2] / 1000
    print(f"| {name} | {seconds:.4f} | {torch.cuda.max_memory_allocated() / 2**30:.2f} |")
    assert found.log_odds.shape == (2, 8400, 80)
    assert gradient.isfinite().all()
    assert (gradient != 0).float().mean() > 0.9
