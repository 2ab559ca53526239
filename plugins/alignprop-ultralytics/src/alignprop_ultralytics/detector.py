"""YOLO (v8, 10, 11, 26) as a differentiable detector: the ultralytics network, with a gradient from both heads.

Shape symbols: B images, C classes, A anchors (all cells of all feature maps).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alignprop_counting.detector import Detector, Predictions
from alignprop_ultralytics.offline import Detect, v10Detect

PADDING = 114 / 255
"""Gray level of the letterbox padding, as in ultralytics."""


def head_problem(model: Any) -> str | None:
    """Return why the head of a network is not supported, or None if it is."""
    head = model.model[-1]
    if type(head) not in (Detect, v10Detect):
        return f"its head is {type(head).__name__}; a detection head (Detect or v10Detect) is needed"
    if head.cv3 is None:
        return "it was fused, which removed a head; use the file from before fusing"
    return None


class Yolo(Detector):
    """A YOLO detection network.

    The one-to-one head is used if the network has one (YOLO26, YOLOv10), else the one-to-many head.

    The forward pass of ultralytics is not usable for training: it can detach the features of the one-to-one head, and
    the head caches anchors, which break a later backward pass if they were computed in inference mode. This class
    therefore runs the layers before the head itself and applies the branches of the head to their features. It never
    calls `fuse()`.

    Args:
        model: a `DetectionModel` of ultralytics, with weights.
        names: class names, in order.
        image_size: longest side in pixels after the letterbox; the default of ultralytics is 640.
        one_to_one: whether to use the one-to-one head; None uses it if the network has one.

    Raises:
        ValueError: the head is not supported, or the network has no one-to-one head.
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
        self.allowed_sizes = f"a multiple of {max(self.strides)}"

    def preprocess(self, images: Tensor) -> tuple[Tensor, float, tuple[int, int]]:
        """Letterbox as in the ultralytics predictor: resize, keep the aspect ratio, pad to a multiple of the stride.

        Resizing is bilinear without antialiasing, like INTER_LINEAR in OpenCV.

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            Pixels (B, 3, H', W'), the factor from image to network pixels, and the padding (left, top) in pixels.
        """
        height, width = images.shape[-2:]
        scale = min(self.image_size / height, self.image_size / width)
        size = max(round(height * scale), 1), max(round(width * scale), 1)
        if size != (height, width):
            images = F.interpolate(images, size=size, mode="bilinear", antialias=False, align_corners=False)
        # The remainder is split between both sides; an odd pixel goes to the bottom or right, as in ultralytics.
        stride = max(self.strides)
        rows, columns = ((self.image_size - side) % stride / 2 for side in size)
        top, bottom, left, right = (round(bar) for bar in (rows - 0.1, rows + 0.1, columns - 0.1, columns + 0.1))
        return F.pad(images, (left, right, top, bottom), value=PADDING), scale, (left, top)

    def describe_preprocessing(self) -> dict[str, Any]:
        """Return the steps of the letterbox."""
        return {
            "resize": f"longer side to {self.image_size}, bilinear, not antialiased",
            "pad": f"gray (114 of 255) on both sides, to a multiple of {max(self.strides)}",
        }

    def features(self, pixels: Tensor) -> list[Tensor]:
        """Return the inputs of the head: one feature map (B, channels, H / stride, W / stride) per stride."""
        layers: list[Any] = list(self.model.model)
        kept: list[Tensor | None] = []  # outputs that later layers use as inputs, by layer number
        x: Any = pixels
        for layer in layers[:-1]:
            x = layer(self._inputs(layer.f, x, kept))
            kept.append(x if layer.i in self.model.save else None)
        found: list[Tensor] = self._inputs(layers[-1].f, x, kept)
        return found

    @staticmethod
    def _inputs(sources: int | list[int], last: Any, kept: list[Any]) -> Any:
        # -1 is the previous layer, other numbers are layers by position.
        if isinstance(sources, int):
            return last if sources == -1 else kept[sources]
        return [last if source == -1 else kept[source] for source in sources]

    def head(self, features: list[Tensor], *, one_to_one: bool) -> tuple[Tensor, Tensor]:
        """Apply the branches of one head to the features.

        Returns:
            Class logits (B, C, A), and boxes (B, A, 4) as left, top, right, bottom in pixels of the network's input.
        """
        head: Any = self.model.model[-1]
        sides, classes = (head.one2one_cv2, head.one2one_cv3) if one_to_one else (head.cv2, head.cv3)
        # Branches are convolutions, one per stride. Flattening gives (B, channels, cells), and all cells together A.
        logits = torch.cat([branch(x).flatten(2) for branch, x in zip(classes, features, strict=True)], 2)
        # `dfl` is the mean of a distribution over distances (YOLOv8 to 11), or the identity (YOLO26): (B, 4, A).
        distances = head.dfl(torch.cat([branch(x).flatten(2) for branch, x in zip(sides, features, strict=True)], 2))
        anchors, strides = self._anchors(features)
        # Distances are from the cell's center to the four sides, in cells: (B, A, 2) to left and top, right and bottom.
        low, high = distances.transpose(1, 2).chunk(2, -1)
        return logits, torch.cat([anchors - low, anchors + high], -1) * strides

    def _anchors(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the centers of all cells, (A, 2) as x, y in cells, and their strides (A, 1) in pixels."""
        # Computed anew in each call: cached tensors could come from inference mode.
        centers, strides = [], []
        for x, stride in zip(features, self.strides, strict=True):
            rows, columns = (torch.arange(side, device=x.device, dtype=x.dtype) + 0.5 for side in x.shape[-2:])
            y, x_ = torch.meshgrid(rows, columns, indexing="ij")
            centers.append(torch.stack([x_, y], -1).flatten(0, 1))
            strides.append(x.new_full((len(centers[-1]), 1), stride))
        return torch.cat(centers), torch.cat(strides)

    def forward(self, images: Tensor) -> Predictions:
        """Detect objects in images (B, 3, H, W) in [0, 1]; boxes are in pixels of these images."""
        images = images.to(next(self.model.parameters()).dtype)
        pixels, scale, (left, top) = self.preprocess(images)
        logits, boxes = self.head(self.features(pixels), one_to_one=self.one_to_one)
        # Undo the letterbox: subtract the padding, then divide by the resize factor.
        padding = torch.tensor([left, top, left, top], dtype=boxes.dtype, device=boxes.device)
        return Predictions(logits.transpose(1, 2), (boxes - padding) / scale, self.one_to_one)
