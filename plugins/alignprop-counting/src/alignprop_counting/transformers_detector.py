"""RT-DETR and DETR as detectors, with the models of transformers.

RT-DETR: Zhao et al., arXiv:2304.08069. DETR: Carion et al., arXiv:2005.12872. Both are one-to-one: trained with
Hungarian matching, they fire once per object.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from alignprop_counting.detector import Detections, Detector, Predictions, suppress


def corners(boxes: Tensor, height: int, width: int) -> Tensor:
    """Turn boxes (..., 4) of center, width, height, relative to the image size, into corners in pixels."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    scale = torch.tensor([width, height, width, height], dtype=boxes.dtype, device=boxes.device)
    return torch.cat([center - half, center + half], -1) * scale


class TransformersDetector(Detector):
    """Base of both: the model, its class names, its image size.

    Args:
        model: `RTDetrForObjectDetection` or `DetrForObjectDetection`.
        image_size: side in pixels, with the meaning it has in the original image processor.
    """

    default_size: ClassVar[int]

    def __init__(self, model: Any, image_size: int | None = None) -> None:
        super().__init__()
        self.model: Any = model
        labels: dict[int, str] = model.config.id2label
        self.names = tuple(labels[i] for i in sorted(labels))
        self.image_size = image_size or self.default_size

    def outputs(self, pixels: Tensor) -> Any:
        """Run the model on preprocessed pixels and return its own output object."""
        return self.model(pixel_values=pixels)

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype


class _Attached(TorchFunctionMode):
    """Makes `detach` return the tensor itself, so that the graph is not cut."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return args[0] if func is Tensor.detach else func(*args, **(kwargs or {}))


class RtDetr(TransformersDetector):
    """RT-DETR: class probabilities are independent (a sigmoid each).

    For its own training, the original detaches the queries and boxes that the encoder passes to the decoder, and the
    boxes that a decoder layer passes to the next. The predictions depend on the pixels through those too, so here they
    stay attached: the values are the same, and the gradient is the derivative.
    """

    default_size = 640

    def __init__(self, model: Any, image_size: int | None = None) -> None:
        super().__init__(model, image_size)
        # Feature maps are upsampled and concatenated, so sides must be multiples of the stride. Every query starts at a
        # location of the feature maps, so there must be at least as many locations as queries.
        strides, queries = model.config.feat_strides, model.config.num_queries
        step = max(strides)
        locations = sum((step // stride) ** 2 for stride in strides)
        self.allowed_sizes = f"a multiple of {step} from {step * math.ceil(math.sqrt(queries / locations))}"

    def preprocess(self, images: Tensor) -> Tensor:
        """Resize to a square, bilinear with antialias; no normalization (as the original)."""
        size = (self.image_size, self.image_size)
        return F.interpolate(images.to(self._dtype), size=size, mode="bilinear", antialias=True)

    def outputs(self, pixels: Tensor) -> Any:
        """Run the model on preprocessed pixels without detaching anything and return its own output object."""
        with _Attached():
            return super().outputs(pixels)

    def forward(self, images: Tensor) -> Predictions:
        """Run the detector on images (B, 3, H, W) in [0, 1]."""
        outputs = self.outputs(self.preprocess(images))
        return Predictions(outputs.logits, corners(outputs.pred_boxes, *images.shape[-2:]), one_to_one=True)


class Detr(TransformersDetector):
    """DETR: a softmax over the classes and "no object"."""

    default_size = 800

    def __init__(self, model: Any, image_size: int | None = None) -> None:
        super().__init__(model, image_size)
        for name, values in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width after resizing, rounded as the original does.

        The shortest side becomes `image_size`, unless the longest would exceed 1333 / 800 of that.
        """
        short, long = min(height, width), max(height, width)
        longest, goal = int(self.image_size * 1333 / 800), float(self.image_size)
        if long / short * goal > longest:
            goal = longest * short / long
        if short == round(goal):
            return height, width
        new_short, new_long = round(goal), int(goal * long / short)
        return (new_short, new_long) if height <= width else (new_long, new_short)

    def preprocess(self, images: Tensor) -> Tensor:
        """Resize the shortest side to `image_size`, bilinear with antialias; normalize by ImageNet mean and std."""
        size = self.resized(*images.shape[-2:])
        images = F.interpolate(images.to(self._dtype), size=size, mode="bilinear", antialias=True)
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        normal: Tensor = (images - mean.to(images)) / std.to(images)
        return normal

    def forward(self, images: Tensor) -> Predictions:
        """Run the detector on images (B, 3, H, W) in [0, 1]."""
        outputs = self.outputs(self.preprocess(images))
        log_p = outputs.logits.log_softmax(-1)[..., :-1]  # (B, A, C); the last class is "no object"
        # log(1 - p) of a probability that rounds to 1 would be minus infinity.
        rest = torch.log1p(-log_p.exp().clamp(max=1 - torch.finfo(log_p.dtype).eps))
        return Predictions(log_p - rest, corners(outputs.pred_boxes, *images.shape[-2:]), one_to_one=True)

    @torch.no_grad()
    def detect(self, predictions: Predictions, threshold: float, overlap: float = 0.5) -> Detections:
        """Take the best class of every query, as the original does; classes exclude each other. No suppression."""
        scores, classes = predictions.probabilities.max(-1)
        return suppress(predictions.boxes, scores, classes, threshold, None)
