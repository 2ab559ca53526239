"""The detector interface: class log-odds and boxes with a gradient to the pixels, and hard detections without one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

MAX_DETECTIONS = 300
"""Maximum detections per image, best first; the limit of ultralytics and RT-DETR."""

MAX_CANDIDATES = 30_000
"""Maximum boxes per image that non-maximum suppression starts from, best first; the limit of ultralytics."""


@dataclass(frozen=True)
class Predictions:
    """Outputs of a detector for B images at A locations (queries or anchors) and C classes.

    Attributes:
        log_odds: (B, A, C) log p / (1 - p) of every class at every location, with the gradient.
        boxes: (B, A, 4) left, top, right, bottom in pixels of the original images; with the gradient.
        one_to_one: whether the detector was trained to fire once per object. If not, it fires at several locations for
            each object, and counting must suppress the duplicates.
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
    """The objects a detector reports, best first; D slots per image, of which some may be empty.

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

    A subclass sets the attributes and implements `forward`. It resizes and normalizes like the original
    implementation, but differentiably, and accepts images of any size from 32 x 32 and any floating-point type.

    Attributes:
        names: class names, in the order of the classes.
        image_size: side in pixels that images are resized to.
        allowed_sizes: allowed values of `image_size`, for messages ("a multiple of 32"); empty if all are.
    """

    names: tuple[str, ...]
    image_size: int
    allowed_sizes: str = ""

    @abstractmethod
    def forward(self, images: Tensor) -> Predictions:
        """Run the detector on images (B, 3, H, W) in [0, 1]."""

    def describe_preprocessing(self) -> dict[str, Any]:
        """Return labels and values of the preprocessing, for `alignprop rewards show`; empty if not described."""
        return {}

    @torch.no_grad()
    def detect(self, predictions: Predictions, threshold: float, overlap: float = 0.5) -> Detections:
        """Turn predictions into objects, like the original post-processing.

        One-to-one: the best pairs of location and class, as many as there are locations and at most 300. Otherwise: the
        best class of every location, and non-maximum suppression within each class at an intersection over union of
        `overlap`, of which the best 300 boxes are kept. In both cases only scores above `threshold` are kept.
        """
        boxes, probabilities = predictions.boxes, predictions.probabilities
        if not predictions.one_to_one:
            scores, classes = probabilities.max(-1)
            return suppress(boxes, scores, classes, threshold, overlap)
        locations, num_classes = probabilities.shape[1:]
        # (B, A, C) -> (B, A * C): one location may report several classes, as in RT-DETR's own post-processing.
        scores, order = probabilities.flatten(1).topk(min(locations, MAX_DETECTIONS), dim=1)
        boxes = boxes.gather(1, (order // num_classes)[..., None].expand(-1, -1, 4))
        return suppress(boxes, scores, order % num_classes, threshold, None)


def intersection_over_union(a: Tensor, b: Tensor) -> Tensor:
    """Return (..., N, M) for boxes (..., N, 4) and (..., M, 4); 0 where both boxes are empty."""
    low = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])
    high = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    common = (high - low).clamp(min=0).prod(-1)  # (..., N, M)
    area_a, area_b = ((x[..., 2:] - x[..., :2]).clamp(min=0).prod(-1) for x in (a, b))
    together = area_a[..., :, None] + area_b[..., None, :] - common
    return common / together.clamp(min=torch.finfo(together.dtype).tiny)


def suppress(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float, overlap: float | None) -> Detections:
    """Keep scores above the threshold and, with an `overlap`, apply greedy non-maximum suppression within each class.

    Args:
        boxes: (B, A, 4).
        scores: (B, A).
        classes: (B, A).
        threshold: scores must be greater.
        overlap: suppress a box that overlaps a better kept one of its class by more than this; None keeps all.
    """
    most = MAX_DETECTIONS if overlap is None else MAX_CANDIDATES
    best = min(most, int((scores > threshold).sum(1).max())) if scores.numel() else 0
    scores, order = scores.topk(best, dim=1)
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    classes = classes.gather(1, order)
    keep = scores > threshold
    if overlap is not None:
        unsuppressed = torch.zeros_like(keep)
        for i in range(len(boxes)):
            places = batched_nms(boxes[i].float(), scores[i].float(), classes[i], overlap)  # best first
            unsuppressed[i, places[:MAX_DETECTIONS]] = True
        keep &= unsuppressed
    scores = scores.masked_fill(~keep, 0)
    if best > MAX_DETECTIONS:
        scores, order = scores.topk(MAX_DETECTIONS, dim=1)
        boxes, classes = boxes.gather(1, order[..., None].expand(-1, -1, 4)), classes.gather(1, order)
    return Detections(boxes, scores, classes.masked_fill(scores == 0, -1))
