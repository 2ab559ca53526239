"""RT-DETR and DETR as detectors, with the models of transformers.

RT-DETR: Zhao et al., arXiv:2304.08069. DETR: Carion et al., arXiv:2005.12872. Both are one-to-one: trained with
Hungarian matching, they fire once per object.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import DetrImageProcessor, RTDetrImageProcessor

from alignprop_counting.detector import Detections, Detector, Predictions, suppress
from alignprop_counting.processors import build_processor, describe_processor, prepare


def corners(boxes: Tensor, height: int, width: int) -> Tensor:
    """Turn boxes (..., 4) of center, width, height, relative to the image size, into corners in pixels."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    scale = torch.tensor([width, height, width, height], dtype=boxes.dtype, device=boxes.device)
    return torch.cat([center - half, center + half], -1) * scale


class TransformersDetector(Detector):
    """Base of both: the model, its class names, its image processor.

    Args:
        model: `RTDetrForObjectDetection` or `DetrForObjectDetection`.
        image_size: side in pixels, with the meaning it has in the original image processor; None is the processor's.
        processor: the model's image processor, as `build_processor` returns it; None is the default of its class.
    """

    processor_class: ClassVar[type[Any]]

    def __init__(self, model: Any, image_size: int | None = None, processor: Any = None) -> None:
        super().__init__()
        self.model: Any = model
        labels: dict[int, str] = model.config.id2label
        self.names = tuple(labels[i] for i in sorted(labels))
        self.processor: Any = processor or build_processor(self.processor_class)
        if image_size is not None:
            self.processor.size = type(self.processor.size)(**self.sides(image_size))
        size = dict(self.processor.size)
        self.image_size = next(int(size[key]) for key in ("height", "shortest_edge", "max_height") if size.get(key))

    @abstractmethod
    def sides(self, image_size: int) -> dict[str, int]:
        """Return the size of the image processor for an image size."""

    def preprocess(self, images: Tensor) -> Tensor:
        """Prepare images (B, 3, H, W) in [0, 1] as the original does, but differentiably."""
        return prepare(self.processor, images.to(self._dtype))["pixel_values"]

    def describe_preprocessing(self) -> dict[str, Any]:
        """Return the steps of the image processor."""
        return describe_processor(self.processor)

    def outputs(self, pixels: Tensor, mask: Tensor | None = None) -> Any:
        """Run the model on preprocessed pixels and return its own output object."""
        return self.model(pixel_values=pixels, pixel_mask=mask)

    def run(self, images: Tensor) -> Any:
        """Prepare images and run the model on them."""
        inputs = prepare(self.processor, images.to(self._dtype))
        return self.outputs(inputs["pixel_values"], inputs.get("pixel_mask"))

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

    processor_class = RTDetrImageProcessor

    def __init__(self, model: Any, image_size: int | None = None, processor: Any = None) -> None:
        super().__init__(model, image_size, processor)
        # Feature maps are upsampled and concatenated, so sides must be multiples of the stride. Every query starts at a
        # location of the feature maps, so there must be at least as many locations as queries.
        strides, queries = model.config.feat_strides, model.config.num_queries
        step = max(strides)
        locations = sum((step // stride) ** 2 for stride in strides)
        self.allowed_sizes = f"a multiple of {step} from {step * math.ceil(math.sqrt(queries / locations))}"

    def sides(self, image_size: int) -> dict[str, int]:
        """Return a square."""
        return {"height": image_size, "width": image_size}

    def outputs(self, pixels: Tensor, mask: Tensor | None = None) -> Any:
        """Run the model on preprocessed pixels without detaching anything and return its own output object."""
        with _Attached():
            return super().outputs(pixels, mask)

    def forward(self, images: Tensor) -> Predictions:
        """Run the detector on images (B, 3, H, W) in [0, 1]."""
        outputs = self.run(images)
        return Predictions(outputs.logits, corners(outputs.pred_boxes, *images.shape[-2:]), one_to_one=True)


class Detr(TransformersDetector):
    """DETR: a softmax over the classes and "no object"."""

    processor_class = DetrImageProcessor

    def sides(self, image_size: int) -> dict[str, int]:
        """Return the shortest side, and the longest that the original allows in proportion: 1333 for 800."""
        return {"shortest_edge": image_size, "longest_edge": int(image_size * 1333 / 800)}

    def forward(self, images: Tensor) -> Predictions:
        """Run the detector on images (B, 3, H, W) in [0, 1]."""
        outputs = self.run(images)
        log_p = outputs.logits.log_softmax(-1)[..., :-1]  # (B, A, C); the last class is "no object"
        # log(1 - p) of a probability that rounds to 1 would be minus infinity.
        rest = torch.log1p(-log_p.exp().clamp(max=1 - torch.finfo(log_p.dtype).eps))
        return Predictions(log_p - rest, corners(outputs.pred_boxes, *images.shape[-2:]), one_to_one=True)

    @torch.no_grad()
    def detect(self, predictions: Predictions, threshold: float, overlap: float = 0.5) -> Detections:
        """Take the best class of every query, as the original does; classes exclude each other. No suppression."""
        scores, classes = predictions.probabilities.max(-1)
        return suppress(predictions.boxes, scores, classes, threshold, None)
