"""YOLO (v8, 10, 11, 26) as a detector: the network of ultralytics, with a gradient from every head to the pixels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alignprop_counting.detector import Detector, Predictions
from alignprop_ultralytics.offline import Detect, v10Detect

PADDING = 114 / 255
"""Grey of the letterbox's bars, as ultralytics fills them."""


def head_problem(model: Any) -> str | None:
    """Say why a network's head cannot be used here; None if it can."""
    head = model.model[-1]
    if type(head) not in (Detect, v10Detect):
        return f"its head is {type(head).__name__}; a detection head (Detect or v10Detect) is needed"
    if head.cv3 is None:
        return "it was fused, which removed a head; take the file from before"
    return None


class Yolo(Detector):
    """A YOLO detection network.

    The one-to-one head is used where the network has one (YOLO26, YOLOv10), else the one-to-many head. In ultralytics'
    own forward the one-to-one head may see detached features, and the head keeps anchors from its last call, which
    break a backward pass if that call ran in inference mode. So the layers before the head are run here, and the head's
    own branches are applied to the features they give. `fuse()` is never called.

    Args:
        model: a `DetectionModel` of ultralytics, with weights.
        names: class names, in order.
        image_size: longest side in pixels after the letterbox; ultralytics' own default is 640.
        one_to_one: which head to use; None takes the one-to-one head if there is one.
    """

    def __init__(
        self, model: Any, names: tuple[str, ...], image_size: int = 640, one_to_one: bool | None = None
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.names = names
        self.image_size = image_size
        problem = head_problem(model)
        if problem:
            raise ValueError(problem)
        has = getattr(model.model[-1], "one2one_cv3", None) is not None
        if one_to_one and not has:
            raise ValueError("this network has no one-to-one head")
        self.one_to_one = has if one_to_one is None else one_to_one
        self.strides = tuple(int(s) for s in model.stride)
        self.fitting = f"a multiple of {max(self.strides)}"

    def preprocess(self, images: Tensor) -> tuple[Tensor, float, tuple[int, int]]:
        """Letterbox as ultralytics' predictor does: resize, keep the aspect, pad with grey to whole strides.

        Bilinear without antialias, as OpenCV's INTER_LINEAR.

        Returns:
            the pixels, the scale from the images to them, and the bars' (left, top) width in pixels.
        """
        height, width = images.shape[-2:]
        scale = min(self.image_size / height, self.image_size / width)
        size = max(round(height * scale), 1), max(round(width * scale), 1)
        if size != (height, width):
            images = F.interpolate(images, size=size, mode="bilinear", antialias=False, align_corners=False)
        stride = max(self.strides)
        rows, columns = ((self.image_size - side) % stride / 2 for side in size)
        top, bottom, left, right = (round(bar) for bar in (rows - 0.1, rows + 0.1, columns - 0.1, columns + 0.1))
        return F.pad(images, (left, right, top, bottom), value=PADDING), scale, (left, top)

    def features(self, pixels: Tensor) -> list[Tensor]:
        """Return the feature maps the head takes, one a stride."""
        layers: list[Any] = list(self.model.model)
        kept: list[Tensor | None] = []
        x: Any = pixels
        for layer in layers[:-1]:
            x = layer(self._inputs(layer.f, x, kept))
            kept.append(x if layer.i in self.model.save else None)
        found: list[Tensor] = self._inputs(layers[-1].f, x, kept)
        return found

    @staticmethod
    def _inputs(sources: int | list[int], last: Any, kept: list[Any]) -> Any:
        if isinstance(sources, int):
            return last if sources == -1 else kept[sources]
        return [last if source == -1 else kept[source] for source in sources]

    def head(self, features: list[Tensor], *, one_to_one: bool) -> tuple[Tensor, Tensor]:
        """Apply a head's branches to the features.

        Returns:
            class logits (B, C, A), and boxes (B, A, 4) as left, top, right, bottom in pixels of the network's input.
        """
        head: Any = self.model.model[-1]
        sides, classes = (head.one2one_cv2, head.one2one_cv3) if one_to_one else (head.cv2, head.cv3)
        logits = torch.cat([branch(x).flatten(2) for branch, x in zip(classes, features, strict=True)], 2)
        distances = head.dfl(torch.cat([branch(x).flatten(2) for branch, x in zip(sides, features, strict=True)], 2))
        anchors, strides = self._anchors(features)
        low, high = distances.transpose(1, 2).chunk(2, -1)
        return logits, torch.cat([anchors - low, anchors + high], -1) * strides

    def _anchors(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Cell centres (A, 2) in cells, and strides (A, 1)."""
        centres, strides = [], []
        for x, stride in zip(features, self.strides, strict=True):
            rows, columns = (torch.arange(side, device=x.device, dtype=x.dtype) + 0.5 for side in x.shape[-2:])
            y, x_ = torch.meshgrid(rows, columns, indexing="ij")
            centres.append(torch.stack([x_, y], -1).flatten(0, 1))
            strides.append(x.new_full((len(centres[-1]), 1), stride))
        return torch.cat(centres), torch.cat(strides)

    def forward(self, images: Tensor) -> Predictions:
        """Look at images (B, 3, H, W) in [0, 1]."""
        images = images.to(next(self.model.parameters()).dtype)
        pixels, scale, (left, top) = self.preprocess(images)
        logits, boxes = self.head(self.features(pixels), one_to_one=self.one_to_one)
        bars = torch.tensor([left, top, left, top], dtype=boxes.dtype, device=boxes.device)
        return Predictions(logits.transpose(1, 2), (boxes - bars) / scale, self.one_to_one)
