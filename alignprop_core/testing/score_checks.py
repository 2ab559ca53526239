"""Checks of the scores: shape, dtype, values, independence of samples, frozen parameters, devices."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from alignprop_core.testing.images import natural_images
from alignprop_core.testing.subject import CheckFailed, NotApplicable, Subject, close, fails_as, listed, require

SIZES = ((32, 32), (40, 72), (96, 33))
"""Heights and widths that every reward must accept."""

SAMPLE_TOLERANCE = 1e-3
"""float32 rounding differs between a batch and single samples; larger differences show a dependence."""


def check_shape(subject: Subject) -> None:
    """Scoring returns one score per sample for images of any size and aspect ratio."""
    for height, width in SIZES:
        for count in (1, 3):
            with fails_as(f"{height}x{width} images in a batch of {count} fail: {{error}}"):
                subject.scores(natural_images(count, height, width))


def check_finite(subject: Subject) -> None:
    """Scores are finite for photographs, black, white, gray and noise."""
    images = subject.pixels
    for name, inputs in {
        "photographs": images,
        "black images": torch.zeros_like(images),
        "white images": torch.ones_like(images),
        "gray images": torch.full_like(images, 0.5),
        "noise": torch.rand(images.shape, generator=torch.Generator().manual_seed(0)),
    }.items():
        scores, prompts = subject.scores(inputs), subject.batch(inputs).prompts
        bad = [i for i, finite in enumerate(scores.isfinite().tolist()) if not finite]
        prompt = f', the first for the prompt "{prompts[bad[0]]}"' if bad and prompts else ""
        require(
            not bad,
            f"{name}: the scores are {listed(scores)}{prompt}. Look for a division by a standard deviation, log(0) or "
            "sqrt of 0; add a small constant.",
        )


def check_batch_of_one(subject: Subject) -> None:
    """A batch of one works and has a finite score."""
    with fails_as("a batch of one fails: {error}. Look for squeeze() and statistics over the batch."):
        scores = subject.scores(subject.pixels[:1])
    require(
        scores.isfinite().all(),
        f"a batch of one scores {listed(scores)}. Look for a standard deviation over the batch.",
    )


def check_dtype(subject: Subject) -> None:
    """Scores are float64 for float64 images, else float32; rewards of plugins accept bfloat16 and float16 images."""
    # Runs score float32 images; other users of a plugin's reward may not.
    low = () if subject.plugins.local(subject.name) else (torch.bfloat16, torch.float16)
    for dtype in (torch.float32, torch.float64, *low):
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        with fails_as(f"{dtype} images fail: {{error}}. Convert them at the start of score()."):
            scores = subject.scores(subject.pixels.to(dtype))
        require(scores.dtype == expected, f"{dtype} images give {scores.dtype} scores; they should be {expected}.")


def check_range(subject: Subject) -> None:
    """Scores of photographs are near the declared typical range: at most its width beyond either end."""
    if subject.spec.typical_range is None:
        raise NotApplicable("its spec declares no typical_range")
    low, high = subject.spec.typical_range
    scores = subject.scores()
    require(
        low - (high - low) <= scores.min() and scores.max() <= high + (high - low),
        f"photographs score {listed(scores)}, far outside the declared typical_range ({low:g}, {high:g}). Correct the "
        "range or the scale of the score.",
    )


def check_prompts_declared(subject: Subject) -> None:
    """The scores of a reward that declares needs_prompts=False do not depend on the prompts."""
    if subject.spec.needs_prompts:
        raise NotApplicable("it declares that it reads prompts")
    other = replace(subject, prompts=("something else entirely",))
    other.__dict__["reward"] = subject.reward
    here, there = subject.scores(), other.scores()
    require(
        close(there, here, 1e-6),
        f"scores change with the prompt, from {listed(here)} to {listed(there)}, but its spec says "
        "needs_prompts=False. Declare needs_prompts=True.",
    )


def check_samples_independent(subject: Subject) -> None:
    """A sample's score and gradient do not depend on the other samples of the batch."""
    images, batch = subject.pixels, subject.batch(subject.pixels)
    together = subject.scores()
    with torch.no_grad():
        alone = torch.cat([subject.reward(batch[i : i + 1]) for i in range(len(images))])
    require(
        close(alone, together, SAMPLE_TOLERANCE),
        f"the scores are {listed(together)} in one batch and {listed(alone)} one by one. A sample's score must not "
        "depend on its neighbors: reduce over pixels and channels only.",
    )
    # The first sample again, among other neighbors.
    first = subject.scores(torch.cat([images[:1], 1 - images[1:]]))[:1]
    require(
        close(first, together[:1], SAMPLE_TOLERANCE),
        f"the first sample scores {listed(together[:1])}, and {listed(first)} with other neighbors. Look for "
        "statistics over the batch, or state kept between calls.",
    )
    if subject.spec.differentiable:
        leaf = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(subject.reward(subject.batch(leaf))[0], leaf)
        require(
            gradient[1:].abs().max() <= 1e-6 * gradient[0].abs().max(),
            "the first sample's score has a gradient at the pixels of other samples.",
        )


def check_input_unchanged(subject: Subject) -> None:
    """Scoring does not modify the images, prompts or metadata."""
    images = subject.pixels.clone()
    batch = subject.batch(images)
    prompts, metadata = copy.deepcopy(list(batch.prompts)), copy.deepcopy(list(batch.metadata))
    with torch.no_grad():
        subject.reward(batch)
    require(
        torch.equal(images, subject.pixels),
        "score() modifies the images. Other rewards score the same tensor: do not use in-place operations (sub_, "
        "clamp_, +=) on batch.images.",
    )
    unchanged = list(batch.prompts) == prompts and list(batch.metadata) == metadata
    require(unchanged, "score() modifies the prompts or the metadata; work on a copy.")


def check_deterministic(subject: Subject) -> None:
    """The same images get the same scores in every call, whatever the random state."""
    found = []
    for seed in (0, 1, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found.append(subject.scores())
    require(
        all(close(scores, found[0], 1e-6) for scores in found),
        f"the same images score {' then '.join(map(listed, found))}. Look for dropout, random crops, or state kept "
        "between calls.",
    )


def check_frozen(subject: Subject) -> None:
    """All parameters are frozen, all modules stay in eval mode, and scoring leaves no gradient on a parameter."""
    reward = subject.reward
    free = [name for name, parameter in reward.named_parameters() if parameter.requires_grad]
    require(not free, f"these parameters are not frozen: {', '.join(free[:3])}. freeze() must freeze them all.")
    reward.train(True)
    training = [name or type(reward).__name__ for name, module in reward.named_modules() if module.training]
    reward.freeze()
    require(
        not training, f"train() puts {', '.join(training[:3])} into training mode; a reward must stay in eval mode."
    )
    if subject.spec.differentiable:
        reward(subject.batch(subject.pixels.clone().requires_grad_())).sum().backward()
    else:
        subject.scores()
    changed = [name for name, p in reward.named_parameters() if p.grad is not None or p.requires_grad]
    require(not changed, f"scoring leaves a gradient on the parameters {', '.join(changed[:3])}, or unfreezes them.")


def check_mixed_precision(subject: Subject) -> None:
    """Under bfloat16 autocast the scores are finite float32, close to those without autocast."""
    expected = subject.scores()
    with (
        fails_as("it fails under autocast: {error}. End with .float()."),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        scores = subject.scores()
    require(
        scores.isfinite().all() and close(scores, expected, 0.25),
        f"under bfloat16 autocast the scores are {listed(scores)}, otherwise {listed(expected)}. Disable autocast "
        "where numbers are large or nearly equal: with torch.autocast(images.device.type, enabled=False).",
    )


def check_device_move(subject: Subject) -> None:
    """The reward can be moved, and returns scores on the device of the images.

    Without an accelerator, torch's "meta" device is used. It has shapes but no values, which is enough to find tensors
    that were not moved if score() does not read values.
    """
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "meta"
    moved = copy.deepcopy(subject.reward).to(device)
    try:
        with torch.no_grad():
            scores = moved(subject.batch(subject.pixels.to(device)))
    except Exception as error:
        if "same device" in str(error) or "not on the expected device" in str(error):
            raise CheckFailed(
                f"a tensor was not moved with the reward ({str(error).splitlines()[0]}). Register constants with "
                "register_buffer, or create them on images.device."
            ) from error
        if device == "meta":
            raise NotApplicable("there is no accelerator, and score() reads values, which meta tensors lack") from None
        raise
    require(
        scores.device.type == device,
        f"the scores of images on {device} are on {scores.device}. Create them on batch.images.device.",
    )
    if device != "meta":
        expected = subject.scores()
        require(
            close(scores.cpu(), expected, 0.02),
            f"the scores are {listed(scores)} on {device} and {listed(expected)} on the CPU.",
        )
