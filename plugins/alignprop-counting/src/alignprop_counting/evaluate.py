"""Evaluation of a detector on labeled images: mAP50, hard counts, and how close the soft counts are to them."""

from __future__ import annotations

import torch
from torch import Tensor

from alignprop_counting.detector import Detections, Detector, intersection_over_union
from alignprop_counting.soft_count import soft_count

LOWEST_SCORE = 0.001
"""Detections down to this score enter the precision-recall curve; the usual value of COCO evaluations."""


@torch.no_grad()
def evaluate_detector(
    detector: Detector,
    images: Tensor,
    classes: Tensor,
    boxes: Tensor,
    *,
    threshold: float = 0.5,
    sharpness: float = 2.0,
    overlap: float = 0.5,
    batch: int = 256,
) -> dict[str, float]:
    """Evaluate a detector on images of known objects.

    Args:
        detector: the detector.
        images: (N, 3, H, W), uint8 or in [0, 1].
        classes: (N, M) class of each object, -1 for padding.
        boxes: (N, M, 4) left, top, right, bottom in pixels.
        threshold, sharpness, overlap: of the counts; see `alignprop_counting.soft_count`.
        batch: images per forward pass.

    Returns:
        `map50`: mean over the classes present of the average precision at IoU 0.5 (101-point interpolation);
        `hard_count_right`: fraction of images whose hard count of their own class is right (of all classes, for empty
        images); `soft_hard_difference`: mean absolute difference of soft and hard counts of that class (for empty
        images, of each class in turn); `soft_count_error`: the same of soft and true counts.
    """
    num_classes = len(detector.names)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    right, difference, error = [], [], []
    for i in range(0, len(images), batch):
        rows = slice(i, i + batch)
        pixels = images[rows].float() / 255 if images.dtype == torch.uint8 else images[rows]
        predictions = detector(pixels)
        everything = detector.detect(predictions, LOWEST_SCORE, overlap)
        found.append((everything.classes, everything.scores, _hits(everything, classes[rows], boxes[rows])))
        number = (classes[rows] >= 0).sum(1)
        samples = torch.arange(len(pixels), device=pixels.device)
        # The class to count in each image: its first object's, or any class where the image is empty.
        asked = torch.where(number > 0, classes[rows][:, 0], (samples + i) % num_classes)
        hard = detector.detect(predictions, threshold, overlap)
        hard_count = hard.count(samples, asked)
        soft = soft_count(
            predictions.log_odds[samples, :, asked],
            predictions.boxes,
            predictions.one_to_one,
            threshold=threshold,
            sharpness=sharpness,
            overlap=overlap,
        )
        true = (classes[rows] == asked[:, None]).sum(1)
        right.append(torch.where(number > 0, hard_count == true, (hard.classes < 0).all(1)))
        difference.append((soft - hard_count).abs())
        error.append((soft - true).abs())
    totals = torch.bincount(classes[classes >= 0], minlength=num_classes)
    return {
        "map50": _mean_average_precision(found, totals),
        "hard_count_right": float(torch.cat(right).float().mean()),
        "soft_hard_difference": float(torch.cat(difference).mean()),
        "soft_count_error": float(torch.cat(error).mean()),
    }


def _hits(detections: Detections, classes: Tensor, boxes: Tensor) -> Tensor:
    """Match detections, best first, to objects of their class at IoU above 0.5, each object once: (B, D) bool."""
    overlap = intersection_over_union(detections.boxes, boxes)
    overlap = overlap.masked_fill(detections.classes[..., None] != classes[:, None, :], 0)
    overlap = overlap.masked_fill(classes[:, None, :] < 0, 0)
    free = torch.ones_like(classes, dtype=torch.bool)
    hits = torch.zeros_like(detections.classes, dtype=torch.bool)
    order = detections.scores.argsort(dim=1, descending=True)
    images = torch.arange(len(classes), device=classes.device)
    # All images at once, one detection of each per iteration: an object can be matched only once.
    for rank in range(order.shape[1]):
        place = order[:, rank]
        value, match = (overlap[images, place] * free).max(1)
        hit = value > 0.5
        hits[images, place] = hit
        free[images, match] &= ~hit
    return hits


def _mean_average_precision(found: list[tuple[Tensor, Tensor, Tensor]], totals: Tensor) -> float:
    """Average precision of each class that has objects, averaged; 101 recall levels, as the COCO evaluation."""
    classes, scores, hits = (torch.cat([part[i].flatten() for part in found]).cpu() for i in range(3))
    totals = totals.cpu()
    levels = torch.linspace(0, 1, 101)
    values = []
    for class_id in totals.nonzero()[:, 0].tolist():
        mine = classes == class_id
        hit = hits[mine][scores[mine].argsort(descending=True)].float()
        recall = hit.cumsum(0) / totals[class_id]
        precision = hit.cumsum(0) / torch.arange(1, len(hit) + 1)
        # The best precision at this recall or a higher one: a running maximum from the right.
        precision = torch.cat([precision, torch.zeros(1)]).flip(0).cummax(0).values.flip(0)
        values.append(precision[torch.searchsorted(recall, levels)].mean())
    return float(torch.stack(values).mean()) if values else 0.0
