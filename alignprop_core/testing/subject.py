"""The subject of the conformance checks: a reward with its options, and the images and prompts to score."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from alignprop_core.errors import RewardError
from alignprop_core.registry.registry import Registry, default_registry
from alignprop_core.reward import ImageBatch, Reward, check_scores
from alignprop_core.specs import RewardSpec
from alignprop_core.testing.images import natural_images

DEFAULT_PROMPTS = ("a cat", "two dogs", "three birds on a blue background")


class CheckFailed(AssertionError):
    """A conformance check failed; the message says what was found and how to fix it."""


class NotApplicable(Exception):
    """A check does not apply to this reward or machine; the message says why."""


def require(condition: object, message: str) -> None:
    """Raise `CheckFailed` unless the condition holds."""
    if not condition:
        raise CheckFailed(message)


@contextmanager
def fails_as(message: str) -> Iterator[None]:
    """Turn an exception of the reward into `CheckFailed`; `{error}` in the message is replaced by its text."""
    try:
        yield
    except (RewardError, RuntimeError, ValueError, TypeError, IndexError) as error:
        raise CheckFailed(message.format(error=str(error).rstrip("."))) from error


@dataclass(frozen=True, eq=False)
class Subject:
    """A reward to check, named as in a run config.

    Attributes:
        name: the reward's name, or `distribution/name`.
        options: its options, as in a run config.
        prompts: prompts to score with, repeated as needed for all images.
        metadata: the prompts' metadata, as in a JSONL prompt file, repeated likewise.
        images: (B, 3, H, W) float32 in [0, 1], B at least 3; three 64x64 crops of photographs if None.
        registry: where the reward is looked up; the installed plugins if None.
        gradient_tolerance: maximum relative error of the gradient against finite differences.
        gradient_dtype: float64, or float32 for a reward that cannot compute in float64 (then with a tolerance of
            about 0.05).
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    prompts: Sequence[str] = DEFAULT_PROMPTS
    metadata: Sequence[Mapping[str, Any]] = ()
    images: Tensor | None = None
    registry: Registry | None = None
    gradient_tolerance: float = 1e-3
    gradient_dtype: torch.dtype = torch.float64

    @cached_property
    def plugins(self) -> Registry:
        """The registry with the reward."""
        return default_registry() if self.registry is None else self.registry

    @cached_property
    def spec(self) -> RewardSpec:
        """The reward's spec."""
        return self.plugins.reward(self.name).spec

    @cached_property
    def reward(self) -> Reward:
        """The reward on the CPU, built as in a run, once."""
        return self.plugins.load_reward(self.name, self.options)

    @cached_property
    def pixels(self) -> Tensor:
        """The images, (B, 3, H, W) float32, without a graph."""
        return natural_images() if self.images is None else self.images.detach().float()

    def batch(self, images: Tensor) -> ImageBatch:
        """Return a batch of images with prompts and metadata."""
        n = len(images)
        prompts = [self.prompts[i % len(self.prompts)] for i in range(n)] if self.prompts else ()
        metadata = [
            copy.deepcopy(dict(self.metadata[i % len(self.metadata)])) for i in range(n if self.metadata else 0)
        ]
        return ImageBatch(images=images, prompts=prompts, metadata=metadata)

    def scores(self, images: Tensor | None = None) -> Tensor:
        """Return the scores (B,) of images (the subject's if None), without a graph; checks shape and dtype."""
        images = self.pixels if images is None else images
        with torch.no_grad():
            return check_scores(self.name, self.reward(self.batch(images)), len(images), differentiable=False)

    def gradient(self, images: Tensor, reward: Reward | None = None) -> tuple[Tensor, Tensor]:
        """Return scores (B,) and the gradient of their sum with respect to the images, (B, 3, H, W)."""
        leaf = images.detach().clone().requires_grad_()
        scores = check_scores(self.name, (reward or self.reward)(self.batch(leaf)), len(leaf), differentiable=True)
        (gradient,) = torch.autograd.grad(scores.sum(), leaf, allow_unused=True)
        if gradient is None:
            raise CheckFailed(
                "the scores have a graph, but no gradient reaches batch.images. Look for .detach(), .data, NumPy or "
                "PIL between the images and the network."
            )
        return scores.detach(), gradient

    def need_gradient(self) -> None:
        """Raise `NotApplicable` if the reward is declared differentiable=False."""
        if not self.spec.differentiable:
            raise NotApplicable("it is declared differentiable=False")


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether two sets of scores agree, relative to the largest expected score."""
    size = max(float(expected.abs().max()), 1e-6)
    return bool((found.double() - expected.double()).abs().max() <= tolerance * size)


def listed(scores: Tensor) -> str:
    """Format the first scores for a message."""
    return "[" + ", ".join(f"{float(score):.6g}" for score in scores.flatten()[:4]) + "]"
