"""The reward interface: a frozen torch module that maps images and prompts to one score per sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from alignprop_core.errors import RewardError
from alignprop_core.specs import RewardConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageBatch:
    """Images with the prompts they were generated from.

    Attributes:
        images: (B, 3, H, W), RGB in [0, 1], floating point; carries the gradient.
        prompts: B strings; empty strings if none are given.
        metadata: B mappings: the prompt file's keys other than `prompt` (such as `{"number": 3}`); empty if none
            are given.

    Raises:
        ValueError: the images have another shape or an integer dtype, or the lengths differ.
    """

    images: Tensor
    prompts: Sequence[str] = field(default=())
    metadata: Sequence[Mapping[str, Any]] = field(default=())

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), got {tuple(self.images.shape)}")
        if not self.images.is_floating_point():
            raise ValueError(f"images must be floating point in [0, 1], got {self.images.dtype}")
        size = len(self)
        for name, default in (("prompts", ""), ("metadata", {})):
            values = getattr(self, name)
            if len(values) == 0 and size > 0:
                object.__setattr__(self, name, tuple(default for _ in range(size)))
            elif len(values) != size:
                raise ValueError(f"{size} images but {len(values)} {name}")

    def __len__(self) -> int:
        return int(self.images.shape[0])

    def __getitem__(self, index: slice) -> ImageBatch:
        """Return a part of the batch; the images stay attached to their graph."""
        if not isinstance(index, slice):
            raise TypeError("an ImageBatch takes slices only: batch[i : i + 1] is one sample")
        return ImageBatch(images=self.images[index], prompts=self.prompts[index], metadata=self.metadata[index])


class Reward(nn.Module, ABC):
    """Base class of rewards. Higher is always better.

    A subclass names its options class as `Config`, builds what it needs in `__init__`, and implements `score`.
    Its parameters are frozen and it is in eval mode from the moment it is built; `train()` does not change that,
    so dropout or batch statistics can never make a score depend on its neighbors.
    """

    Config: ClassVar[type[RewardConfig]] = RewardConfig
    differentiable: ClassVar[bool] = True
    """Whether `score` has a gradient. Plugins declare it in their spec; a class without a plugin declares it here."""

    def __init__(self, config: RewardConfig | None = None) -> None:
        super().__init__()
        self.config: RewardConfig = config if config is not None else self.Config()

    @abstractmethod
    def score(self, batch: ImageBatch) -> Tensor:
        """Score a batch.

        Args:
            batch: images (B, 3, H, W) in [0, 1], prompts and metadata; not modified in place.

        Returns:
            (B,), one score per sample; float32, or float64 if the images are. A sample's score does not depend on
            the other samples.
        """

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        """Check a prompt before the base model loads; the default accepts every prompt.

        For rewards that parse prompts or metadata, such as a number of objects. It is called for every prompt of a
        run, so it must be cheap and run no network.

        Args:
            prompt: the prompt.
            metadata: the prompt file's other keys for this prompt.

        Raises:
            PromptError: `score` cannot use the prompt.
        """

    def describe_preprocessing(self) -> Mapping[str, Any]:
        """Describe what `score` does to the images before its network, for `rewards show NAME --options`.

        Returns:
            A short label for each fact, such as `{"resize": "224 x 224, bicubic", "mean": (0.5, 0.5, 0.5)}`; values
            are strings, numbers or lists. The default is empty: not described.
        """
        return {}

    def forward(self, batch: ImageBatch) -> Tensor:
        """Return `score(batch)`; exists so that torch module hooks work."""
        return self.score(batch)

    def freeze(self) -> Reward:
        """Freeze all parameters and switch to eval mode; the loader calls it once. Returns the reward."""
        self.requires_grad_(False)
        return self.train(False)

    def train(self, mode: bool = True) -> Reward:
        """Stay in eval mode: a reward is a fixed function."""
        super().train(False)
        return self


def check_scores(name: str, scores: object, size: int, *, differentiable: bool) -> Tensor:
    """Check a reward's return value and return it as a tensor.

    Checks type, shape, dtype and gradient, but not values: that would cost one host sync per term. The training step
    checks once for all terms that the values are finite.

    Args:
        name: name of the reward, for messages.
        scores: what the reward returned.
        size: number of images, B.
        differentiable: whether the scores must carry a gradient.

    Raises:
        RewardError: the scores are not a tensor (B,) of float32 or float64, or have no gradient but need one.
    """
    if not isinstance(scores, Tensor):
        raise RewardError(
            f'Reward "{name}" returned {type(scores).__name__}; it must return a tensor of shape ({size},), '
            "one score per sample."
        )
    if tuple(scores.shape) != (size,):
        raise RewardError(
            f'Reward "{name}" returned shape {tuple(scores.shape)} for a batch of {size}; it must return ({size},), '
            "one score per sample. Reduce over pixels inside the reward, never over the batch."
        )
    if scores.dtype not in (torch.float32, torch.float64):
        raise RewardError(
            f'Reward "{name}" returned {scores.dtype}; scores are float32 (float64 for float64 images): '
            "end with .float()."
        )
    if differentiable and not scores.requires_grad:
        raise RewardError(
            f'Reward "{name}" returned scores without a gradient, so there is nothing to learn from. Remove .detach(), '
            "torch.no_grad() or NumPy from its score(); or, if it cannot be differentiated, declare "
            "differentiable=False (in its spec; in the class, if it has none) and use it under evaluation.rewards."
        )
    return scores
