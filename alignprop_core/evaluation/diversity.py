"""Diversity: the mean distance between the images of one prompt with different seeds, in an encoder's features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from alignprop_core.errors import ConfigError, RewardError
from alignprop_core.mix.term import Term

LAYOUT_SIDE, EDGE_SIDE, ORIENTATIONS, COLOR_BINS = 8, 4, 4, 8
_EDGE_GAIN = 4.0


@dataclass(frozen=True)
class Encoder:
    """The features in which diversity is measured.

    Attributes:
        name: its name in evaluation.json.
        features: (B, 3, H, W) in [0, 1] -> (B, D), floating point.
    """

    name: str
    features: Callable[[Tensor], Tensor]


def built_in_features(images: Tensor) -> Tensor:
    """Return fixed features of layout, color and edges, without a network.

    Three groups of values in [0, 1], each divided by the square root of its size and of the number of groups, so that
    the distance between two images is a root mean square over each group and over the groups, between 0 and 1:

    - layout: the image at 8 x 8 pixels, bilinear with antialiasing (3 * 64 values);
    - color: for each channel, the cumulative histogram of the pixels in 8 equal bins (3 * 8 values);
    - edges: for each cell of a 4 x 4 grid, the mean length of brightness differences between neighboring pixels in
      4 orientations, times 4, at most 1 (4 * 16 values).

    The features cover where objects are, their colors and their texture, not what they are: two foxes in different
    places differ, a fox and a dog of the same shape and color hardly do.

    Args:
        images: (B, 3, H, W) in [0, 1].

    Returns:
        (B, 280) float32.
    """
    images = images.detach().float()
    layout = F.interpolate(images, (LAYOUT_SIDE, LAYOUT_SIDE), mode="bilinear", antialias=True).flatten(1)
    edges = torch.arange(1, COLOR_BINS + 1, device=images.device) / COLOR_BINS
    # Cumulative, so that a small shift of a color moves the features a little instead of from one bin to the next.
    color = torch.stack([(images <= edge).float().mean((2, 3)) for edge in edges], -1).flatten(1)
    gray = images.mean(1, keepdim=True)
    across = gray[..., 1:, 1:] - gray[..., 1:, :-1]  # (B, 1, H - 1, W - 1)
    down = gray[..., 1:, 1:] - gray[..., :-1, 1:]
    # Modulo pi: a step from dark to light is the same edge as one from light to dark.
    length, angle = torch.hypot(across, down), torch.atan2(down, across) % math.pi
    which = (angle / math.pi * ORIENTATIONS).long().clamp(max=ORIENTATIONS - 1)
    maps = torch.cat([length * (which == i) for i in range(ORIENTATIONS)], 1)  # one map per orientation
    texture = (F.adaptive_avg_pool2d(maps, EDGE_SIDE) * _EDGE_GAIN).clamp(max=1).flatten(1)
    groups = (layout, color, texture)
    return torch.cat([group / math.sqrt(len(groups) * group.shape[1]) for group in groups], 1)


BUILT_IN = Encoder("layout, color and edges", built_in_features)


def encoder_of(label: str | None, terms: Sequence[Term]) -> Encoder:
    """Return the encoder that `evaluation.diversity_encoder` names: a term's image features, at unit length.

    The term's reward has a method `image_features(images)`, (B, 3, H, W) in [0, 1] -> (B, D), floating point. The
    encoder moves an offloaded reward to its device for each call, as scoring does, and raises a `RewardError` that
    names the term if the method fails or returns something else.

    Args:
        label: label of a term, or None for the built-in features.
        terms: the evaluation's terms.

    Raises:
        ConfigError: the term's reward has no such method.
    """
    if label is None:
        return BUILT_IN
    term = next(term for term in terms if term.label == label)
    image_features = getattr(term.reward, "image_features", None)
    if not callable(image_features):
        raise ConfigError(
            f'evaluation.diversity_encoder: the reward of "{label}" has no image features '
            "(a method image_features). Name another term, or omit the key for the built-in features."
        )

    def features(images: Tensor) -> Tensor:
        with term.placed, term.named("raised"):
            found = image_features(images)
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise RewardError(
                f'Reward "{label}" returned {what} from image_features for {len(images)} images; it must return a '
                f"tensor of shape ({len(images)}, D)."
            )
        if not found.isfinite().all():
            raise RewardError(f'Reward "{label}" returned image features that are not finite.')
        return F.normalize(found.float(), dim=1)

    return Encoder(label, features)


def diversity_by_prompt(features: Tensor, images_per_prompt: int) -> list[float]:
    """Return the mean Euclidean distance over all pairs of a prompt's images, for each prompt.

    Args:
        features: (N, D), in prompt order.
        images_per_prompt: at least 2.
    """
    return [float(torch.pdist(part.double()).mean()) for part in torch.split(features, images_per_prompt)]
