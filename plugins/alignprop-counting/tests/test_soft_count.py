"""The soft count is the documented formula, and the hard count in its limit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from alignprop_counting.detector import intersection_over_union, suppress
from alignprop_counting.soft_count import ROUNDS, SLOPE, duplicate_weights, sharpened, soft_count

EXACT = torch.float64


def count(log_odds: Tensor, boxes: Tensor, one_to_one: bool = False, sharpness: float = 2.0) -> Tensor:
    return soft_count(log_odds, boxes, one_to_one, threshold=0.5, sharpness=sharpness, overlap=0.5)


def boxes_at(*corners: tuple[float, float], size: float = 10.0) -> Tensor:
    return torch.tensor([[x, y, x + size, y + size] for x, y in corners], dtype=EXACT)


def test_sharpening_is_the_power_of_the_odds() -> None:
    p = torch.tensor([0.01, 0.2, 0.3, 0.7, 0.99], dtype=EXACT)
    t, s = 0.3, 3.0
    expected = (p / t) ** s / ((p / t) ** s + ((1 - p) / (1 - t)) ** s)
    assert torch.allclose(sharpened(p.logit(), t, s), expected, rtol=1e-9)
    assert sharpened(torch.tensor(math.log(t / (1 - t)), dtype=EXACT), t, s) == pytest.approx(0.5)


def test_one_to_one_is_a_plain_sum() -> None:
    log_odds = torch.randn(3, 40, dtype=EXACT)
    boxes = torch.zeros(3, 40, 4, dtype=EXACT)
    assert torch.allclose(count(log_odds, boxes, one_to_one=True), sharpened(log_odds, 0.5, 2.0).sum(1))


def test_one_to_many_is_the_formula() -> None:
    g = torch.Generator().manual_seed(0)
    corner = 20 * torch.rand(1, 15, 2, generator=g, dtype=EXACT)
    boxes = torch.cat([corner, corner + 8 + 4 * torch.rand(1, 15, 2, generator=g, dtype=EXACT)], -1)
    log_odds = torch.randn(1, 15, generator=g, dtype=EXACT)
    order = log_odds[0].argsort(descending=True).tolist()
    weights = dict.fromkeys(order, 1.0)
    for _ in range(ROUNDS):
        before = dict(weights)
        for place, a in enumerate(order):
            weights[a] = 1.0
            for b in order[:place]:
                iou = float(intersection_over_union(boxes[0, a : a + 1], boxes[0, b : b + 1]))
                weights[a] *= 1 - before[b] / (1 + math.exp(-SLOPE * (iou - 0.5)))
    total = sum(weights[a] * float(sharpened(log_odds[0, a], 0.5, 2.0)) for a in order)
    assert float(count(log_odds, boxes)) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("copies", [1, 2, 10, 60])
def test_an_object_counts_once_however_many_boxes_it_has(copies: int) -> None:
    spots = boxes_at((0, 0), (30, 0), (0, 40))
    boxes = spots.repeat_interleave(copies, 0) + 0.2 * torch.rand(3 * copies, 4, dtype=EXACT)
    log_odds = 4 + torch.rand(1, 3 * copies, dtype=EXACT)
    assert float(count(log_odds, boxes[None])) == pytest.approx(3, abs=0.02)


def test_weak_boxes_on_one_object_count_as_the_best_of_them() -> None:
    boxes = boxes_at(*[(0.0, 0.0)] * 20)[None]
    log_odds = torch.linspace(-3, -1, 20, dtype=EXACT)[None]
    assert float(count(log_odds, boxes)) == pytest.approx(float(sharpened(log_odds.amax(), 0.5, 2.0)), rel=1e-3)


def test_background_locations_add_next_to_nothing() -> None:
    log_odds = torch.full((1, 8400), -7.0, dtype=EXACT)  # probability 0.0009
    assert float(count(log_odds, torch.zeros(1, 8400, 4, dtype=EXACT), one_to_one=True)) < 0.01


def test_sharp_counts_are_what_non_maximum_suppression_keeps() -> None:
    g = torch.Generator().manual_seed(3)
    agreed = []
    for _ in range(50):
        spots = 80 * torch.rand(6, 2, generator=g, dtype=EXACT)
        corner = spots.repeat_interleave(8, 0) + 0.5 * torch.randn(48, 2, generator=g, dtype=EXACT)
        boxes = torch.cat([corner, corner + 14 + torch.rand(48, 2, generator=g, dtype=EXACT)], -1)[None]
        log_odds = 3 * torch.randn(1, 48, generator=g, dtype=EXACT)
        kinds = torch.zeros(1, 48, dtype=torch.long)
        hard = suppress(boxes, log_odds.sigmoid(), kinds, 0.5, 0.5).count(torch.tensor([0]), torch.tensor([0]))
        agreed.append(abs(float(count(log_odds, boxes, sharpness=30.0)) - float(hard)))
    # What is left are boxes whose overlap is near the threshold itself.
    assert sum(agreed) / len(agreed) < 0.05


def test_the_gradient_is_the_derivative() -> None:
    g = torch.Generator().manual_seed(1)
    corner = 20 * torch.rand(2, 9, 2, generator=g, dtype=EXACT)
    boxes = torch.cat([corner, corner + 12], -1).requires_grad_()
    log_odds = torch.randn(2, 9, generator=g, dtype=EXACT).requires_grad_()
    for one_to_one in (True, False):
        assert torch.autograd.gradcheck(lambda x, y, kind=one_to_one: count(x, y, kind), (log_odds, boxes))


def test_identical_boxes_have_a_finite_gradient() -> None:
    boxes = boxes_at(*[(0.0, 0.0)] * 4)[None].float().requires_grad_()
    log_odds = torch.full((1, 4), 3.0, requires_grad=True)
    gradients = torch.autograd.grad(count(log_odds, boxes).sum(), (log_odds, boxes))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_weights_are_between_zero_and_one() -> None:
    boxes = 50 * torch.rand(2, 30, 4)
    weights = duplicate_weights(torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], -1), 0.5)
    assert weights.min() >= 0
    assert weights.max() <= 1
    assert torch.equal(weights[:, 0], torch.ones(2))


def test_overlap_of_boxes() -> None:
    a, b = boxes_at((0, 0), (20, 20)), boxes_at((0, 0), (5, 0), (100, 0))
    expected = torch.tensor([[1.0, 1 / 3, 0.0], [0.0, 0.0, 0.0]], dtype=EXACT)
    assert torch.allclose(intersection_over_union(a, b), expected)
    empty = torch.zeros(1, 4)
    assert intersection_over_union(empty, empty).item() == 0


def test_hard_suppression_is_greedy_within_a_class() -> None:
    boxes = boxes_at((0, 0), (1, 0), (0, 1), (40, 0))[None]
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.3]], dtype=EXACT)
    kinds = torch.tensor([[0, 0, 1, 0]])
    found = suppress(boxes, scores, kinds, 0.25, 0.5)
    assert found.classes.tolist() == [[0, -1, 1, 0]]
    assert suppress(boxes, scores, kinds, 0.25, None).classes.tolist() == [[0, 0, 1, 0]]
    assert suppress(boxes, scores, kinds, 0.95, 0.5).classes.shape == (1, 0)
