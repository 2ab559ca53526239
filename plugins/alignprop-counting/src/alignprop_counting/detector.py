"""What a detector is: class log-odds and boxes with a gradient at the pixels, and hard detections without one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MOST_CANDIDATES = 300
"""Most candidates an image that hard detection looks at, best first; ultralytics' and RT-DETR's own number."""


@dataclass(frozen=True)
class Predictions:
    """What a detector says about B images at A places (queries or anchors) and C classes.

    Attributes:
        log_odds: (B, A, C) log p / (1 - p) of every class at every place, with the gradient.
        boxes: (B, A, 4) left, top, right, bottom in pixels of the images as they were given; with the gradient.
        one_to_one: whether the detector was trained to fire once an object. If not, one object fires at several
            places, and counting must suppress the duplicates.
    """

    log_odds: Tensor
    boxes: Tensor
    one_to_one: bool

    @property
    def probabilities(self) -> Tensor:
        """(B, A, C) class probabilities in [0, 1]."""
        return self.log_odds.sigmoid()


@dataclass(frozen=True)
class Detections:
    """The objects a detector reports, best first; D places an image, of which the later ones may be empty.

    Attributes:
        boxes: (B, D, 4) left, top, right, bottom in pixels.
        scores: (B, D) probabilities, 0 where there is no object.
        classes: (B, D) class indices, -1 where there is no object.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor

    def count(self, samples: Tensor, classes: Tensor) -> Tensor:
        """Count objects: (N,) float, of `classes[i]` in image `samples[i]`."""
        return (self.classes[samples] == classes[:, None]).sum(1).float()


class Detector(nn.Module, ABC):
    """A frozen detector.

    A subclass sets the attributes and implements `forward`. It resizes and normalises as its original does, by
    differentiable means, and takes images of any size from 32 x 32 and any floating-point type.

    Attributes:
        names: class names, in the order of the classes.
        image_size: side in pixels that images are resized to.
        fitting: what `image_size` may be, for messages ("a multiple of 32"); empty for anything.
    """

    names: tuple[str, ...]
    image_size: int
    fitting: str = ""

    @abstractmethod
    def forward(self, images: Tensor) -> Predictions:
        """Look at images (B, 3, H, W) in [0, 1]."""

    @torch.no_grad()
    def detect(self, predictions: Predictions, threshold: float, overlap: float = 0.5) -> Detections:
        """Turn predictions into objects, as the original's own post-processing does.

        One-to-one: the best pairs of place and class, as many as there are places and at most 300. Otherwise: the best
        class of every place, and non-maximum suppression within each class at an intersection over union of `overlap`.
        In both, scores above `threshold`.
        """
        boxes, probabilities = predictions.boxes, predictions.probabilities
        if not predictions.one_to_one:
            scores, classes = probabilities.max(-1)
            return suppress(boxes, scores, classes, threshold, overlap)
        places, kinds = probabilities.shape[1:]
        scores, order = probabilities.flatten(1).topk(min(places, MOST_CANDIDATES), dim=1)
        boxes = boxes.gather(1, (order // kinds)[..., None].expand(-1, -1, 4))
        return suppress(boxes, scores, order % kinds, threshold, None)


def intersection_over_union(a: Tensor, b: Tensor) -> Tensor:
    """Return (..., N, M) for boxes (..., N, 4) and (..., M, 4); 0 where both boxes are empty."""
    low = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])
    high = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    common = (high - low).clamp(min=0).prod(-1)
    area_a, area_b = ((x[..., 2:] - x[..., :2]).clamp(min=0).prod(-1) for x in (a, b))
    together = area_a[..., :, None] + area_b[..., None, :] - common
    return common / together.clamp(min=torch.finfo(together.dtype).tiny)


def suppress(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float, overlap: float | None) -> Detections:
    """Keep what scores above the threshold and, with an `overlap`, greedy non-maximum suppression within each class.

    Args:
        boxes: (B, A, 4).
        scores: (B, A).
        classes: (B, A).
        threshold: scores must be greater.
        overlap: suppress a box that overlaps a better kept one of its class by more than this; None keeps all.
    """
    best = min(MOST_CANDIDATES, int((scores > threshold).sum(1).max())) if scores.numel() else 0
    scores, order = scores.topk(best, dim=1)
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    classes = classes.gather(1, order)
    keep = scores > threshold
    if overlap is not None:
        same = classes[:, :, None] == classes[:, None, :]
        clash = (intersection_over_union(boxes, boxes) > overlap) & same
        for i in range(1, best):
            keep[:, i] &= ~(clash[:, i, :i] & keep[:, :i]).any(1)
    return Detections(boxes, scores.masked_fill(~keep, 0), classes.masked_fill(~keep, -1))
