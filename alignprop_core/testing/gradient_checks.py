"""Checks of the gradient at the pixels: there as declared, true, finite, everywhere, and worth following."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from alignprop_core.testing.subject import BrokenPromise, Subject, listed

STEPS = 10
STEP_SIZE = 1 / 255
"""Root mean square change of a pixel a step: a grey level."""


def check_differentiable(subject: Subject) -> None:
    """The declaration is true: a gradient where one is declared, none where not."""
    leaf = subject.pictures.clone().requires_grad_()
    scores = subject.reward(subject.batch(leaf))
    if subject.spec.differentiable:
        subject.gradient(subject.pictures)  # raises with the reason
        return
    if scores.requires_grad:
        (gradient,) = torch.autograd.grad(scores.sum(), leaf, allow_unused=True)
        if gradient is not None and bool(gradient.abs().max() > 0):
            raise BrokenPromise(
                "its spec says differentiable=False, but a gradient reaches the pictures. Declare it, so that runs may "
                "train on it; or mark score() with @torch.no_grad()."
            )


def check_gradient(subject: Subject) -> None:
    """Each sample's gradient is finite and not zero, on photographs and on flat pictures."""
    subject.need_gradient()
    scores, gradient = subject.gradient(subject.pictures)
    for i, one in enumerate(gradient):
        if not one.isfinite().all():
            raise BrokenPromise(f"sample {i} (score {float(scores[i]):.6g}) has a gradient with NaN or infinity.")
        if not bool(one.abs().max() > 0):
            raise BrokenPromise(
                f"sample {i} (score {float(scores[i]):.6g}) has no gradient at all: nothing can be learned from it. "
                "Look for round(), argmax, comparisons, or a clamp it sits at the end of."
            )
    for value in (0.0, 0.5, 1.0):
        _, flat = subject.gradient(torch.full_like(subject.pictures, value))
        if not flat.isfinite().all():
            raise BrokenPromise(
                f"a flat picture of value {value:g} has a gradient with NaN or infinity. Look for sqrt, norm, std or "
                "log at 0; add a small constant."
            )


def check_gradcheck(subject: Subject) -> None:
    """The gradient is the derivative: central differences along its own direction and two random ones, each sample.

    In float64 with steps of 1e-6 (float32 with steps of 1e-2 where the subject says so), to the subject's tolerance.
    """
    subject.need_gradient()
    dtype = subject.gradient_dtype
    exact = dtype == torch.float64
    reward = copy.deepcopy(subject.reward).double() if exact else subject.reward
    images = subject.pictures.to(dtype)
    scores, gradient = subject.gradient(images, reward)
    if scores.dtype != dtype:
        raise BrokenPromise(f"{dtype} pictures give {scores.dtype} scores, too coarse for a difference.")
    norms = gradient.flatten(1).norm(dim=1)
    g = torch.Generator().manual_seed(0)
    ways = {"its own direction": gradient / norms.clamp_min(1e-30)[:, None, None, None]}
    for number in (1, 2):
        way = torch.randn(images.shape, generator=g, dtype=dtype)
        ways[f"random direction {number}"] = way / way.flatten(1).norm(dim=1)[:, None, None, None]
    step = 1e-6 if exact else 1e-2
    # A random direction sees a slope about 1/sqrt(pixels) of the gradient's length; below that, errors do not matter.
    floor = norms / images[0].numel() ** 0.5
    for name, way in ways.items():
        with torch.no_grad():
            ahead, behind = (reward(subject.batch(images + sign * step * way)) for sign in (1, -1))
        measured = (ahead - behind) / (2 * step)
        said = (gradient * way).flatten(1).sum(1)
        wrong = (measured - said).abs() > subject.gradient_tolerance * torch.maximum(measured.abs(), floor)
        if wrong.any():
            raise BrokenPromise(
                f"along {name} the gradient says {listed(said[wrong])}, measured is {listed(measured[wrong])}. Part of "
                "the score is detached, or a backward pass of your own is wrong. (For a reward that computes in "
                "float32 inside, set gradient_dtype to torch.float32 and gradient_tolerance to 0.05.)"
            )


def check_saturated_pixels(subject: Subject) -> None:
    """Pixels at exactly 0 and 1 get a gradient as others do."""
    subject.need_gradient()
    images = subject.pictures.clone()
    choice = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    images[choice < 0.25], images[choice > 0.75] = 0.0, 1.0
    _, gradient = subject.gradient(images)
    reached = gradient != 0
    inside = _share(reached, (choice >= 0.25) & (choice <= 0.75))
    for name, where in (("0", choice < 0.25), ("1", choice > 0.75)):
        share = _share(reached, where)
        if share < 0.5 * inside:
            raise BrokenPromise(
                f"{share:.0%} of the pixels at exactly {name} get a gradient, and {inside:.0%} of those between: white "
                "and black areas cannot learn. Do not clamp inside the range; the pictures come clipped to [0, 1]."
            )


def _share(reached: Tensor, where: Tensor) -> float:
    return float(reached[where].float().mean())


def check_improves(subject: Subject) -> None:
    """Ten small steps up its own gradient raise every sample's score; a step that overshoots is halved."""
    subject.need_gradient()
    images, size = subject.pictures, torch.full((len(subject.pictures), 1, 1, 1), STEP_SIZE)
    before, gradient = subject.gradient(images)
    scores = before
    for _ in range(STEPS):
        length = gradient.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-30)
        tried = (images + size * gradient / length).clamp(0, 1)
        new, new_gradient = subject.gradient(tried)
        better = new > scores
        kept = better[:, None, None, None]
        images, gradient = torch.where(kept, tried, images), torch.where(kept, new_gradient, gradient)
        scores, size = torch.where(better, new, scores), torch.where(kept, size, size / 4)
    if not (scores > before).all():
        raise BrokenPromise(
            f"ten steps up its gradient take the scores from {listed(before)} to {listed(scores)}: not every sample "
            "gains. The gradient points the wrong way, or a score is at its highest already."
        )
