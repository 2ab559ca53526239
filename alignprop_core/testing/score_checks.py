"""Checks of the scores: shape, type, values, samples that do not know of each other, frozen parameters, devices."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from alignprop_core.errors import RewardError
from alignprop_core.reward import check_scores
from alignprop_core.testing.pictures import natural_images
from alignprop_core.testing.subject import BrokenPromise, NotApplicable, Subject, close, listed

SIZES = ((32, 32), (40, 72), (96, 33))
"""Heights and widths every reward takes."""

SAMPLE_TOLERANCE = 1e-3
"""Batched and single float32 arithmetic differ by rounding; anything above is a dependence."""


def check_shape(subject: Subject) -> None:
    """One score a sample, whatever the size and the shape of the pictures."""
    for height, width in SIZES:
        for count in (1, 3):
            try:
                subject.scores(natural_images(count, height, width))
            except (RuntimeError, ValueError, IndexError) as error:
                raise BrokenPromise(f"pictures of {height}x{width} pixels, {count} at a time, fail: {error}") from error


def check_batch_of_one(subject: Subject) -> None:
    """A batch of one works, and is scored as a batch."""
    try:
        scores = subject.scores(subject.pictures[:1])
    except (RewardError, RuntimeError, ValueError, IndexError) as error:
        raise BrokenPromise(
            f"a batch of one fails: {error}. Look for squeeze() and statistics over the batch."
        ) from error
    if not scores.isfinite().all():
        raise BrokenPromise(f"a batch of one scores {listed(scores)}. Look for a standard deviation over the batch.")


def check_dtype(subject: Subject) -> None:
    """float32 for float32, bfloat16 and float16 pictures; float64 for float64 ones."""
    for given, due in (
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ):
        try:
            scores = subject.scores(subject.pictures.to(given))
        except (RuntimeError, RewardError, TypeError) as error:
            raise BrokenPromise(f"{given} pictures fail: {error}. Convert them at the start of score().") from error
        if scores.dtype != due:
            raise BrokenPromise(f"{given} pictures give {scores.dtype} scores; they should be {due}.")


def check_finite(subject: Subject) -> None:
    """Scores are finite for photographs, black, white, grey and noise."""
    like = subject.pictures
    noise = torch.rand(like.shape, generator=torch.Generator().manual_seed(0))
    pictures = {
        "photographs": like,
        "black": torch.zeros_like(like),
        "white": torch.ones_like(like),
        "grey": torch.full_like(like, 0.5),
        "noise": noise,
    }
    for name, images in pictures.items():
        scores = subject.scores(images)
        if not scores.isfinite().all():
            raise BrokenPromise(
                f"{name} pictures score {listed(scores)}. Look for a division by a spread, log(0) or sqrt of 0; add a "
                "small constant."
            )


def check_samples_independent(subject: Subject) -> None:
    """A sample's score is the same alone, in a batch, and among other neighbours; so is what its gradient reaches."""
    images, n = subject.pictures, len(subject.pictures)
    together = subject.scores()
    alone = []
    for i in range(n):
        with torch.no_grad():
            alone.append(subject.reward(subject.batch(images)[i : i + 1]))
    if not close(torch.cat(alone), together, SAMPLE_TOLERANCE):
        raise BrokenPromise(
            f"scored together {listed(together)}, one by one {listed(torch.cat(alone))}. A sample's score must not "
            "depend on its neighbours: reduce over pixels and channels only."
        )
    among = images.clone()
    among[1:] = 1 - images[1:]
    first = subject.scores(among)[:1]
    if not close(first, together[:1], SAMPLE_TOLERANCE):
        raise BrokenPromise(
            f"the first sample scores {listed(together[:1])}, and {listed(first)} among other neighbours. Look for "
            "statistics over the batch, or state kept from one call to the next."
        )
    if subject.spec.differentiable:
        leaf = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(subject.reward(subject.batch(leaf))[0], leaf)
        if gradient[1:].abs().max() > 1e-6 * gradient[0].abs().max():
            raise BrokenPromise("the first sample's score has a gradient at other samples' pixels.")


def check_input_unchanged(subject: Subject) -> None:
    """Scoring changes neither pictures nor prompts nor metadata."""
    images = subject.pictures.clone()
    batch = subject.batch(images)
    before = images.clone(), copy.deepcopy(list(batch.prompts)), copy.deepcopy(list(batch.metadata))
    with torch.no_grad():
        subject.reward(batch)
    if not torch.equal(images, before[0]):
        raise BrokenPromise(
            "it changes the pictures it is given. Other rewards score the same tensor: no operation in place (sub_, "
            "clamp_, +=) on batch.images."
        )
    if (list(batch.prompts), list(batch.metadata)) != before[1:]:
        raise BrokenPromise("it changes the prompts or the metadata it is given; work on a copy.")


def check_deterministic(subject: Subject) -> None:
    """The same pictures score the same at every call, whatever the state of the random generators."""
    found = []
    for seed in (0, 1, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found.append(subject.scores())
    if not (close(found[1], found[0], 1e-6) and close(found[2], found[0], 1e-6)):
        raise BrokenPromise(
            f"the same pictures score {listed(found[0])}, then {listed(found[1])}, then {listed(found[2])}. Look for "
            "dropout, random crops, or state kept from one call to the next."
        )


def check_frozen(subject: Subject) -> None:
    """All parameters are frozen, all modules stay in eval mode, and no gradient is kept on a parameter."""
    reward = subject.reward
    loose = [name for name, parameter in reward.named_parameters() if parameter.requires_grad]
    if loose:
        raise BrokenPromise(f"these parameters are not frozen: {', '.join(loose[:3])}. freeze() must freeze them all.")
    reward.train(True)
    training = [name or type(reward).__name__ for name, module in reward.named_modules() if module.training]
    reward.freeze()
    if training:
        raise BrokenPromise(f"train() puts {', '.join(training[:3])} into training mode; a reward stays in eval mode.")
    if subject.spec.differentiable:
        leaf = subject.pictures.clone().requires_grad_()
        reward(subject.batch(leaf)).sum().backward()
    else:
        subject.scores()
    kept = [name for name, parameter in reward.named_parameters() if parameter.grad is not None]
    kept += [name for name, parameter in reward.named_parameters() if parameter.requires_grad]
    if kept:
        raise BrokenPromise(f"scoring leaves a gradient on, or thaws, the parameters {', '.join(kept[:3])}.")


def check_mixed_precision(subject: Subject) -> None:
    """Under bfloat16 autocast it still gives finite float32 scores, near those without."""
    expected = subject.scores()
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = subject.scores()
    except (RuntimeError, RewardError) as error:
        raise BrokenPromise(f"it fails under autocast: {error}. End with .float().") from error
    if not found.isfinite().all() or not close(found, expected, 0.25):
        raise BrokenPromise(
            f"under bfloat16 autocast it scores {listed(found)}, otherwise {listed(expected)}. Leave autocast where "
            "numbers are large or nearly equal: with torch.autocast(images.device.type, enabled=False)."
        )


def check_device_move(subject: Subject) -> None:
    """It can be moved, and scores where the pictures are.

    Moved to an accelerator where there is one. Elsewhere to torch's "meta" device, which has shapes but no values: that
    shows tensors which stayed behind, as long as score() does not look at values.
    """
    moved = copy.deepcopy(subject.reward)
    device = next((name for name, there in _accelerators().items() if there), None)
    if device is not None:
        moved = moved.to(device)
        with torch.no_grad():
            scores = check_scores(
                subject.name,
                moved(subject.batch(subject.pictures.to(device))),
                len(subject.pictures),
                differentiable=False,
            )
        _need_device(scores, device)
        if not close(scores.cpu(), subject.scores(), 0.02):
            raise BrokenPromise(f"on {device} it scores {listed(scores)}, on the CPU {listed(subject.scores())}.")
        return
    try:
        with torch.no_grad():
            scores = moved.to("meta")(subject.batch(subject.pictures.to("meta")))
    except Exception as error:
        if "same device" in str(error) or "not on the expected device" in str(error):
            raise BrokenPromise(
                f"a tensor stays behind when the reward is moved ({str(error).splitlines()[0]}). Keep constants with "
                "register_buffer, or make them on images.device."
            ) from error
        raise NotApplicable("no accelerator is here, and it looks at values, which the meta device lacks") from None
    _need_device(scores, "meta")


def _accelerators() -> dict[str, bool]:
    return {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}


def _need_device(scores: Tensor, device: str) -> None:
    if scores.device.type != device:
        raise BrokenPromise(f"scores of pictures on {device} are on {scores.device}. Make them on batch.images.device.")
