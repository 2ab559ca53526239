"""The differentiable count: how many objects of a class a detector sees, as a sum of sharpened probabilities.

Let p_a be the probability of the class at location a, t the threshold and s the sharpness. The sharpened probability is

    q_a = sigmoid(s * (logit(p_a) - logit(t))),

one half at the threshold; as s grows it becomes a step from 0 to 1 there. A one-to-one detector fires once per object:

    count = sum_a q_a.

A one-to-many detector fires at several locations for each object. With the locations ordered from best to worst, and
o_ab = sigmoid(SLOPE * (IoU(a, b) - overlap)) the degree to which two boxes are one object,

    count = sum_a q_a w_a,    w_a = prod_{b before a} (1 - o_ab w_b),

where w is computed by ROUNDS fixed-point iterations from w = 1. A box counts to the extent that no better box which
itself counts covers the same object: of the boxes on one object only the best counts, with its own q. As s and SLOPE
grow, this becomes greedy non-maximum suppression (each round resolves one more link in chains of boxes, each suppressed
by the one before). It is differentiable in probabilities and boxes. The decay by products of overlaps is that of
soft-NMS (Bodla et al., arXiv:1704.04503) and Matrix NMS (Wang et al., arXiv:2003.10152), applied to counts instead of
scores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from alignprop_counting.detector import intersection_over_union

SLOPE = 40.0
"""How sharply an overlap becomes a duplicate: at 0.1 above the overlap threshold a box is 98% a duplicate."""

ROUNDS = 3
"""Fixed-point iterations of the weights; more change counts by less than 0.02 even in crowded images."""

CANDIDATES = 256
"""Locations of a one-to-many detector that are used, best first: enough for a dozen boxes on each of 20 objects."""


def sharpened(log_odds: Tensor, threshold: float, sharpness: float) -> Tensor:
    """Return q of the module's formula, shaped like `log_odds`."""
    return (sharpness * (log_odds - math.log(threshold / (1 - threshold)))).sigmoid()


def duplicate_weights(boxes: Tensor, overlap: float) -> Tensor:
    """Return the weights w of the module's formula, (N, K) in [0, 1], for boxes (N, K, 4) from best to worst."""
    # (N, K, K): o_ab in row a and column b. The strict lower triangle keeps only the boxes b before a.
    same = (SLOPE * (intersection_over_union(boxes, boxes) - overlap)).sigmoid().tril(-1)
    weights = torch.ones_like(boxes[..., 0])
    for _ in range(ROUNDS):
        # The product over b as a sum of logarithms: prod's own gradient is slow and unstable near zeros. The clamp
        # keeps away from log 0, where the gradient would not be finite.
        weights = torch.log1p(-(same * weights[:, None, :]).clamp(max=1 - 1e-6)).sum(-1).exp()
    return weights


def soft_count(
    log_odds: Tensor, boxes: Tensor, one_to_one: bool, *, threshold: float, sharpness: float, overlap: float
) -> Tensor:
    """Count the objects of one class in each of N images.

    Args:
        log_odds: (N, A) log-odds of the class.
        boxes: (N, A, 4) left, top, right, bottom.
        one_to_one: whether the detector fires once per object.
        threshold: probability at which a location counts one half, in (0, 1).
        sharpness: how sharply the count steps there; above 0.
        overlap: intersection over union above which two boxes are one object (one-to-many detectors only).

    Returns:
        (N,) expected counts, at least 0.
    """
    if one_to_one:
        return sharpened(log_odds, threshold, sharpness).sum(1)
    # Only the K best of A locations (8400 at 640 px): overlaps need K x K memory, and the rest adds next to nothing.
    log_odds, order = log_odds.topk(min(CANDIDATES, log_odds.shape[1]), dim=1)  # (N, K), sorted from best to worst
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))  # (N, K, 4) in the same order
    return (sharpened(log_odds, threshold, sharpness) * duplicate_weights(boxes, overlap)).sum(1)
