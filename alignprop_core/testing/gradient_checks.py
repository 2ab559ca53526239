"""Checks of the gradient with respect to the images: correct, finite, nonzero and useful for training."""

from __future__ import annotations

import copy

import torch

from alignprop_core.testing.subject import Subject, listed, require

STEPS = 10
STEP_SIZE = 1 / 255
"""Root mean square change of a pixel per step: one gray level."""


def check_differentiable(subject: Subject) -> None:
    """The spec declares correctly whether the reward has a gradient."""
    if subject.spec.differentiable:
        subject.gradient(subject.pixels)  # raises with the reason
        return
    leaf = subject.pixels.clone().requires_grad_()
    scores = subject.reward(subject.batch(leaf))
    if scores.requires_grad:
        (gradient,) = torch.autograd.grad(scores.sum(), leaf, allow_unused=True)
        require(
            gradient is None or not gradient.any(),
            "its spec says differentiable=False, but the images get a gradient. Declare differentiable=True, so that "
            "runs can train on the reward, or decorate score() with @torch.no_grad().",
        )


def check_gradient(subject: Subject) -> None:
    """Each sample's gradient is finite and nonzero on photographs, and finite on uniform images."""
    subject.need_gradient()
    scores, gradient = subject.gradient(subject.pixels)
    for i, one in enumerate(gradient):
        sample = f"sample {i} (score {float(scores[i]):.6g})"
        require(one.isfinite().all(), f"the gradient of {sample} has NaN or infinity.")
        require(
            one.any(),
            f"the gradient of {sample} is zero, so nothing can be learned from it. Look for round(), argmax, "
            "comparisons, or a clamp whose limit the value has reached.",
        )
    for value in (0.0, 0.5, 1.0):
        _, uniform = subject.gradient(torch.full_like(subject.pixels, value))
        require(
            uniform.isfinite().all(),
            f"the gradient of a uniform image of value {value:g} has NaN or infinity. Look for sqrt, norm, std or log "
            "at 0; add a small constant.",
        )


def check_gradcheck(subject: Subject) -> None:
    """The gradient of each sample agrees with central differences along the gradient and two random directions.

    Uses float64 with steps of 1e-6 or, for a score with kinks (abs, max) that such a step crosses, 1e-9; float32 with
    steps of 1e-2 if the subject asks for it.
    """
    subject.need_gradient()
    dtype = subject.gradient_dtype
    exact = dtype == torch.float64
    reward = copy.deepcopy(subject.reward).double() if exact else subject.reward
    g = torch.Generator().manual_seed(0)
    # Off kinks: equal neighbors, as photographs have, are one for max and for the absolute difference.
    images = subject.pixels.to(dtype).lerp(torch.rand(subject.pixels.shape, generator=g, dtype=dtype), 1e-3)
    scores, gradient = subject.gradient(images, reward)
    require(scores.dtype == dtype, f"{dtype} images give {scores.dtype} scores, too coarse for finite differences.")
    norms = gradient.flatten(1).norm(dim=1)
    directions = {"the gradient": gradient}  # each (B, 3, H, W), normalized per sample below
    directions |= {f"random direction {n}": torch.randn(images.shape, generator=g, dtype=dtype) for n in (1, 2)}
    steps = (1e-6, 1e-9) if exact else (1e-2,)
    # Along a random direction the slope is about 1/sqrt(pixels) of the gradient's norm; smaller errors do not matter.
    floor = norms / images[0].numel() ** 0.5
    for name, direction in directions.items():
        unit = direction / direction.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None, None]
        slope = (gradient * unit).flatten(1).sum(1)
        wrong = torch.ones_like(slope, dtype=torch.bool)
        for step in steps:
            with torch.no_grad():
                ahead, behind = (reward(subject.batch(images + sign * step * unit)) for sign in (1, -1))
            measured = (ahead - behind) / (2 * step)
            # A sample is right if it is with either step.
            wrong &= (measured - slope).abs() > subject.gradient_tolerance * torch.maximum(measured.abs(), floor)
        require(
            not wrong.any(),
            f"along {name}, the slope is {listed(slope[wrong])} by the gradient and {listed(measured[wrong])} by "
            "finite differences. Part of the score is detached, a custom backward pass is wrong, or the score has a "
            "kink or step (abs, max, round) at these images. (For a reward that computes in float32 inside, set "
            "gradient_dtype to torch.float32 and gradient_tolerance to 0.05.)",
        )


def check_saturated_pixels(subject: Subject) -> None:
    """Pixels at exactly 0 and 1 get a gradient like other pixels."""
    subject.need_gradient()
    images = subject.pixels.clone()
    choice = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    zero, one = choice < 0.25, choice > 0.75
    images[zero], images[one] = 0.0, 1.0
    reached = (subject.gradient(images)[1] != 0).float()
    others = float(reached[~(zero | one)].mean())
    for value, where in ((0, zero), (1, one)):
        share = float(reached[where].mean())
        require(
            share >= 0.5 * others,
            f"{share:.0%} of the pixels at exactly {value} get a gradient, and {others:.0%} of those between 0 and 1: "
            "white and black areas cannot learn. Do not clamp the images; they are already clipped to [0, 1].",
        )


def check_improves(subject: Subject) -> None:
    """Ten small steps of gradient ascent on the images raise every sample's score."""
    subject.need_gradient()
    images, size = subject.pixels, torch.full((len(subject.pixels), 1, 1, 1), STEP_SIZE)
    before, gradient = subject.gradient(images)
    scores = before
    for _ in range(STEPS):
        rms = gradient.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-30)
        tried = (images + size * gradient / rms).clamp(0, 1)
        new, new_gradient = subject.gradient(tried)
        better = new > scores
        kept = better[:, None, None, None]
        images, gradient = torch.where(kept, tried, images), torch.where(kept, new_gradient, gradient)
        # A step that overshoots is undone and repeated with a quarter of its size.
        scores, size = torch.where(better, new, scores), torch.where(kept, size, size / 4)
    require(
        (scores > before).all(),
        f"ten steps along the gradient change the scores from {listed(before)} to {listed(scores)}: not every score "
        "rises. The gradient points in the wrong direction, or a score is already at its maximum.",
    )
