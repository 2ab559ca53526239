"""What the conformance checks look at: one reward with its options, and the pictures and prompts it is tried on."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from alignprop_core.registry.registry import Registry, default_registry
from alignprop_core.reward import ImageBatch, Reward, check_scores
from alignprop_core.specs import RewardSpec
from alignprop_core.testing.pictures import natural_images

DEFAULT_PROMPTS = ("a cat", "two dogs", "three birds on a blue background")


class BrokenPromise(AssertionError):
    """A check found a promise broken; the message says which, what was seen, and what to do."""


class NotApplicable(Exception):
    """A check has nothing to look at here (a gradient of a measure, a second device); the message says why."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A reward to check, by name, as a run config would name it.

    Attributes:
        name: the reward's name, or `distribution/name`.
        options: its options, as in a run config.
        prompts: prompts to try it with, cycled over the pictures.
        metadata: what the prompt file would say beside each prompt, cycled likewise.
        images: (B, 3, H, W) float32 in [0, 1], B at least 3; three 64x64 pieces of photographs if None.
        registry: where the reward is found; this environment's if None.
        gradient_tolerance: largest relative error of the gradient against finite differences.
        gradient_dtype: float64, or float32 for a reward that cannot compute in float64 (then with a tolerance of
            0.05 or so).
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
        """The registry the reward is found in."""
        return default_registry() if self.registry is None else self.registry

    @cached_property
    def spec(self) -> RewardSpec:
        """What the plugin declares."""
        return self.plugins.reward(self.name).spec

    @cached_property
    def reward(self) -> Reward:
        """The reward, built as a run builds it: once, on the CPU."""
        return self.plugins.load_reward(self.name, self.options)

    @cached_property
    def pictures(self) -> Tensor:
        """The pictures, (B, 3, H, W) float32, without a graph."""
        return natural_images() if self.images is None else self.images.detach().float()

    def batch(self, images: Tensor) -> ImageBatch:
        """Return pictures with the prompts and metadata in their places."""
        n = len(images)
        prompts = [self.prompts[i % len(self.prompts)] for i in range(n)] if self.prompts else ()
        metadata = (
            [copy.deepcopy(dict(self.metadata[i % len(self.metadata)])) for i in range(n)] if self.metadata else ()
        )
        return ImageBatch(images=images, prompts=prompts, metadata=metadata)

    def scores(self, images: Tensor | None = None) -> Tensor:
        """Score pictures (those of the subject if None) without a graph; (B,), of the right type and shape."""
        images = self.pictures if images is None else images
        with torch.no_grad():
            return check_scores(self.name, self.reward(self.batch(images)), len(images), differentiable=False)

    def gradient(self, images: Tensor, reward: Reward | None = None) -> tuple[Tensor, Tensor]:
        """Return scores (B,) and the gradient of their sum at the pixels, (B, 3, H, W)."""
        leaf = images.detach().clone().requires_grad_()
        scores = check_scores(self.name, (reward or self.reward)(self.batch(leaf)), len(leaf), differentiable=True)
        (gradient,) = torch.autograd.grad(scores.sum(), leaf, allow_unused=True)
        if gradient is None:
            raise BrokenPromise(
                "the scores hang on a graph, but not on the pictures: no gradient reaches batch.images. Look for "
                ".detach(), .data, NumPy or PIL between the pictures and the network."
            )
        return scores.detach(), gradient

    def need_gradient(self) -> None:
        """Leave the check if the reward is declared without a gradient."""
        if not self.spec.differentiable:
            raise NotApplicable("it is declared differentiable=False")


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether two sets of scores agree, relative to the largest of them."""
    size = max(float(expected.abs().max()), 1e-6)
    return bool((found.double() - expected.double()).abs().max() <= tolerance * size)


def listed(scores: Tensor) -> str:
    """Write a few scores for a message."""
    return "[" + ", ".join(f"{float(score):.6g}" for score in scores.flatten()[:4]) + "]"
