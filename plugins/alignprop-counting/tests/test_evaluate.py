"""The evaluation of detectors: known detections give known results."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alignprop_counting.detector import Detector, Predictions
from alignprop_counting.evaluate import evaluate_detector


class Recited(Detector):
    """Reports a fixed list of objects for all images."""

    def __init__(self, boxes: Tensor, log_odds: Tensor) -> None:
        super().__init__()
        self.names = tuple(f"kind {i}" for i in range(log_odds.shape[-1]))
        self.image_size = 32
        self.boxes, self.log_odds = boxes, log_odds

    def forward(self, images: Tensor) -> Predictions:
        return Predictions(self.log_odds, self.boxes, one_to_one=True)


def scene() -> tuple[Tensor, Tensor, Tensor]:
    """Two images: two objects of class 0, one of class 1."""
    boxes = torch.tensor([[[0, 0, 10, 10], [20, 0, 30, 10]], [[5, 5, 15, 15], [0, 0, 0, 0]]]).float()
    return torch.zeros(2, 3, 32, 32), torch.tensor([[0, 0], [1, -1]]), boxes


def certain(kinds: Tensor, count: int = 2) -> Tensor:
    return torch.where(torch.nn.functional.one_hot(kinds + 1, count + 1)[..., 1:] > 0, 8.0, -8.0)


def test_a_perfect_detector_is_perfect() -> None:
    images, classes, boxes = scene()
    found = evaluate_detector(Recited(boxes, certain(classes)), images, classes, boxes)
    assert found["map50"] == pytest.approx(1)
    assert found["hard_count_right"] == 1
    assert found["soft_hard_difference"] < 1e-5
    assert found["soft_count_error"] < 1e-5


def test_an_object_found_twice_is_a_false_alarm() -> None:
    images, classes, boxes = scene()
    doubled = torch.cat([boxes, boxes[:, :1]], 1)
    kinds = torch.cat([classes, classes[:, :1]], 1)
    log_odds = certain(kinds)
    log_odds[:, 2] -= 1 * (log_odds[:, 2] > 0)
    found = evaluate_detector(Recited(doubled, log_odds), images, classes, boxes)
    assert found["map50"] == pytest.approx(1)  # the false alarms score lowest
    assert found["hard_count_right"] == 0
    assert found["soft_count_error"] == pytest.approx(1, abs=1e-3)


def test_a_missed_and_a_misplaced_object_lower_the_average_precision() -> None:
    images, classes, boxes = scene()
    moved = boxes.clone()
    moved[0, 1] += 100
    found = evaluate_detector(Recited(moved, certain(classes)), images, classes, boxes)
    # Class 0: recall reaches one half at precision 1 (51 of 101 levels); class 1 is right.
    assert found["map50"] == pytest.approx((51 / 101 + 1) / 2, abs=1e-4)


def test_an_empty_image_is_right_only_if_nothing_is_found() -> None:
    images, classes, boxes = scene()
    nothing = torch.full_like(classes, -1)
    assert evaluate_detector(Recited(boxes, certain(nothing)), images, nothing, boxes * 0)["hard_count_right"] == 1
    assert evaluate_detector(Recited(boxes, certain(classes)), images, nothing, boxes * 0)["hard_count_right"] == 0
