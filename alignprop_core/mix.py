"""The mix: several rewards, weighted, to one direction at the image.

The mix sees images and scores and returns a gradient at the images; it knows nothing of diffusion. Whoever made the
images sends that gradient on, once, whatever the number of terms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignprop_core.config import MixConfig
from alignprop_core.errors import RewardError, UserError
from alignprop_core.reward import ImageBatch, Reward, check_scores


@dataclass(frozen=True)
class Term:
    """One reward of a mix.

    Attributes:
        label: its name in logs, unique in the mix.
        reward: the frozen module.
        weight: factor of its score in the total; negative asks for less of it.
        ceiling: a sample's score counts only up to here; above it the sample's gradient is zero.
        differentiable: whether scores must carry a gradient.
    """

    label: str
    reward: Reward
    weight: float = 1.0
    ceiling: float | None = None
    differentiable: bool = True

    def score(self, batch: ImageBatch) -> Tensor:
        """Return checked raw scores, (B,); raises `RewardError` naming the term."""
        try:
            scores = self.reward(batch)
        except UserError as error:  # a prompt without a number, say: the reward's own words, and the user's to mend
            raise type(error)(f'Reward "{self.label}": {error}') from error
        except Exception as error:
            raise RewardError(f'Reward "{self.label}" raised {type(error).__name__}: {error}') from error
        due = self.differentiable and torch.is_grad_enabled() and batch.images.requires_grad
        return check_scores(self.label, scores, len(batch), differentiable=due)

    def weighted(self, scores: Tensor) -> Tensor:
        """Return weight * min(score, ceiling), (B,)."""
        held = scores if self.ceiling is None else scores.clamp(max=self.ceiling)
        return self.weight * held


@dataclass(frozen=True)
class Scores:
    """What a mix made of a batch; tensors are detached.

    Attributes:
        raw: label -> (B,), scores as the rewards gave them.
        weighted: label -> (B,), what each term contributes to the total.
        total: (B,), the mix's objective a sample.
    """

    raw: Mapping[str, Tensor]
    weighted: Mapping[str, Tensor]
    total: Tensor


class Mix:
    """Weighted sum of rewards: total = sum over terms of weight * min(score, ceiling).

    Args:
        terms: at least one; labels are unique.
        config: the `mix` section of the run config.
    """

    def __init__(self, terms: Sequence[Term], config: MixConfig | None = None) -> None:
        if not terms:
            raise ValueError("a mix needs at least one term")
        self.terms = tuple(terms)
        self.config = config or MixConfig()

    def to(self, device: torch.device | str) -> Mix:
        """Move all rewards to a device; returns the mix."""
        for term in self.terms:
            term.reward.to(device)
        return self

    @torch.no_grad()
    def score(self, batch: ImageBatch) -> Scores:
        """Score a batch without gradients."""
        return self._collect({term.label: term.score(batch) for term in self.terms})[0]

    def direction(self, batch: ImageBatch, sample_weights: Tensor) -> tuple[Tensor, Scores]:
        """Return the direction of ascent at the images, and the scores.

        Args:
            batch: images without a graph of their own, (B, 3, H, W).
            sample_weights: (B,), each sample's share of the objective.

        Returns:
            Gradient of sum over samples of sample_weight * total, (B, 3, H, W), and detached scores.
        """
        images = batch.images.detach().requires_grad_()
        leaf = ImageBatch(images=images, prompts=batch.prompts, metadata=batch.metadata)
        with torch.enable_grad():
            scores, total = self._collect({term.label: term.score(leaf) for term in self.terms})
            (gradient,) = torch.autograd.grad((total * sample_weights.to(total)).sum(), images)
        return gradient, scores

    def _collect(self, raw: Mapping[str, Tensor]) -> tuple[Scores, Tensor]:
        weighted = {term.label: term.weighted(raw[term.label]) for term in self.terms}
        total = torch.stack(list(weighted.values())).sum(0)
        return (
            Scores(
                raw={label: value.detach() for label, value in raw.items()},
                weighted={label: value.detach() for label, value in weighted.items()},
                total=total.detach(),
            ),
            total,
        )
