"""The mix: weighted sums, ceilings, and a direction at the image that is the gradient of the logged total."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alignprop_core.errors import RewardError
from alignprop_core.mix import Mix, Term
from alignprop_core.reward import ImageBatch, Reward
from tests.toy_rewards import BatchMean, NoGradient, Redness, RednessConfig


class Contrast(Reward):
    def score(self, batch: ImageBatch) -> Tensor:
        return batch.images.flatten(1).std(1)


def batch(size: int = 4) -> ImageBatch:
    images = torch.rand(size, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ImageBatch(images=images, prompts=["x"] * size, metadata=[{}] * size)


def test_direction_is_the_gradient_of_the_logged_weighted_total() -> None:
    terms = [
        Term("redness", Redness(RednessConfig(gain=1000.0)), weight=0.7, ceiling=20.0),
        Term("contrast", Contrast(), weight=-2.0),
    ]
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    direction, scores = Mix(terms).direction(batch(), shares)
    images = batch().images.requires_grad_()
    leaf = ImageBatch(images=images, prompts=["x"] * 4, metadata=[{}] * 4)
    redness, contrast = (term.reward(leaf) for term in terms)
    total = 0.7 * redness.clamp(max=20.0) - 2.0 * contrast
    (shares * total).sum().backward()
    torch.testing.assert_close(direction, images.grad)
    torch.testing.assert_close(scores.total, total.detach())
    torch.testing.assert_close(scores.weighted["redness"] + scores.weighted["contrast"], scores.total)
    assert (redness > 20).any(), "the ceiling is tried"
    assert (redness < 20).any(), "and so is what lies below it"


def test_direction_of_a_sample_does_not_depend_on_its_neighbours() -> None:
    mix = Mix([Term("redness", Redness()), Term("contrast", Contrast())])
    shares = torch.ones(4, dtype=torch.float64)
    whole, _ = mix.direction(batch(), shares)
    alone, _ = mix.direction(batch()[1:2], shares[1:2])
    torch.testing.assert_close(whole[1:2], alone)


def test_broken_rewards_are_named() -> None:
    with pytest.raises(RewardError, match='"mine" returned shape'):
        Mix([Term("mine", BatchMean())]).direction(batch(), torch.ones(4))
    with pytest.raises(RewardError, match='"mine" returned scores without a gradient'):
        Mix([Term("mine", NoGradient())]).direction(batch(), torch.ones(4))


def test_rewards_stay_frozen_and_in_eval_mode() -> None:
    class WithWeights(Redness):
        def __init__(self, config: RednessConfig | None = None) -> None:
            super().__init__(config)
            self.layer = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())

    reward = WithWeights().freeze()
    assert not any(p.requires_grad for p in reward.parameters())
    assert not reward.train().layer.training


def test_image_batch_is_sliceable_and_checks_itself() -> None:
    whole = batch()
    assert len(whole[1:3]) == 2
    assert whole[1:3].prompts == ["x", "x"]
    assert ImageBatch(images=whole.images).prompts == ("",) * 4
    for bad in (torch.rand(3, 8, 8), torch.rand(2, 4, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="images must be"):
            ImageBatch(images=bad)
    with pytest.raises(ValueError, match="4 images but 1 prompts"):
        ImageBatch(images=whole.images, prompts=["x"])
    with pytest.raises(TypeError, match="slices"):
        whole[0]  # type: ignore[index]
