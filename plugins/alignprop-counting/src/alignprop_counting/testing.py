"""Checks that every detector must pass, as plain functions for the tests of plugins that provide one.

from alignprop_counting.testing import check_detector

def test_my_detector() -> None:
    check_detector(MyDetector(...))
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor

from alignprop_counting.detector import Detector, Predictions

SIZES = ((32, 32), (33, 47), (64, 40), (160, 32))
"""Heights and widths that every detector accepts."""


def check_detector(detector: Detector) -> None:
    """Run all checks; raises `AssertionError` at the first that fails."""
    for check in (
        check_shapes,
        check_gradient_is_the_derivative,
        check_samples_are_independent,
        check_types,
        check_no_grad,
    ):
        check(detector)


def random_images(count: int, height: int = 48, width: int = 56, *, seed: int = 0) -> Tensor:
    """Return random images with structure at several scales: (count, 3, height, width) float64 in [0, 1]."""
    g = torch.Generator().manual_seed(seed)
    total = torch.zeros(count, 3, height, width, dtype=torch.float64)
    for cells in (2, 5, 11):
        coarse = torch.rand(count, 3, cells, cells, generator=g, dtype=torch.float64)
        total += torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear") / 3
    return total.clamp(0, 1)


def check_shapes(detector: Detector) -> None:
    """Predictions have the documented shapes and are finite, for every size and for one image and several."""
    for height, width in SIZES:
        for count in (1, 3):
            found = detector(random_images(count, height, width).float())
            locations, num_classes = found.log_odds.shape[1:]
            assert found.log_odds.shape == (count, locations, num_classes), "log_odds must be (B, A, C)"
            assert num_classes == len(detector.names), f"{num_classes} classes but {len(detector.names)} names"
            assert found.boxes.shape == (count, locations, 4), "boxes must be (B, A, 4)"
            assert found.log_odds.isfinite().all(), f"log_odds not finite at {height}x{width}"
            assert found.boxes.isfinite().all(), f"boxes not finite at {height}x{width}"
            hard = detector.detect(found, 0.5)
            assert hard.boxes.shape == (*hard.scores.shape, 4), "boxes must be (B, D, 4)"
            assert ((hard.scores == 0) == (hard.classes == -1)).all(), "empty slots have score 0 and class -1"
            assert not hard.scores.requires_grad, "detections have no gradient"


def check_gradient_is_the_derivative(detector: Detector) -> None:
    """The gradient at the pixels is the derivative of the predictions, and reaches every pixel.

    It is compared with central differences in float64 along random directions, separately for scores and boxes: with a
    path that is detached somewhere the gradient exists but is wrong.
    """
    exact = deepcopy(detector).double()
    images = random_images(2)
    readings: dict[str, Callable[[Predictions], Tensor]] = {
        "log_odds": lambda found: found.log_odds,
        "boxes": lambda found: found.boxes,
    }
    leaf = images.clone().requires_grad_()
    found = exact(leaf)
    g = torch.Generator().manual_seed(1)
    weights, gradients = {}, {}
    for name, reading in readings.items():
        weights[name] = torch.randn(reading(found).shape, generator=g, dtype=images.dtype)
        total = (reading(found) * weights[name]).sum()
        (gradients[name],) = torch.autograd.grad(total, leaf, retain_graph=True)
        assert gradients[name].isfinite().all(), f"the gradient of {name} is not finite"
        reached = (gradients[name].abs().amax(1) > 0).double().mean()
        assert reached > 0.99, f"the gradient of {name} misses pixels"
    size = 1e-6
    for _ in range(2):
        way = torch.randn(images.shape, generator=g, dtype=images.dtype)
        with torch.no_grad():
            ahead, behind = exact(images + size * way), exact(images - size * way)
        for name, reading in readings.items():
            measured = float(((reading(ahead) - reading(behind)) * weights[name]).sum()) / (2 * size)
            slope = float((gradients[name] * way).sum())
            assert abs(slope - measured) < 1e-3 * max(abs(measured), float(gradients[name].norm())), (
                f"the gradient of {name} is {slope:.6g}, differences give {measured:.6g}: part of it is detached"
            )


def check_samples_are_independent(detector: Detector) -> None:
    """A sample's predictions do not depend on the rest of the batch."""
    images = random_images(3).float()
    with torch.no_grad():
        together, alone = detector(images), detector(images[1:2])
    assert torch.allclose(together.log_odds[1:2], alone.log_odds, rtol=1e-4, atol=1e-4), "scores depend on neighbors"
    assert torch.allclose(together.boxes[1:2], alone.boxes, rtol=1e-4, atol=1e-2), "boxes depend on neighbors"


def check_types(detector: Detector) -> None:
    """bf16, fp16 and float64 images are accepted, and images are not modified."""
    images = random_images(1)
    with torch.no_grad():
        reference = detector(images.float()).log_odds
        for kind in (torch.float64, torch.float16, torch.bfloat16):
            given = images.to(kind)
            before = given.clone()
            found = detector(given).log_odds
            assert found.isfinite().all(), f"not finite for {kind}"
            assert torch.equal(given, before), f"images of {kind} were changed in place"
            exact = detector(given.float()).log_odds
            assert torch.allclose(found.float(), exact, rtol=1e-4, atol=1e-4), f"{kind} images are computed in {kind}"
        assert reference.dtype == torch.float32, "a float32 detector gives float32"


def check_no_grad(detector: Detector) -> None:
    """A call in no_grad mode does not break a later backward pass."""
    with torch.no_grad():
        detector(random_images(1, 40, 40).float())
    images = random_images(1, 40, 40).float().requires_grad_()
    (gradient,) = torch.autograd.grad(detector(images).log_odds.sum(), images)
    assert gradient.isfinite().all(), "the gradient after a call in no_grad mode is not finite"
