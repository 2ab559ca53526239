"""The rewards: distance of the count from the requested number, presence and absence of objects."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from alignprop_core.errors import PromptError
from alignprop_core.registry.registry import Registry, default_registry
from alignprop_core.reward import ImageBatch, Reward
from alignprop_core.specs import RewardConfig
from alignprop_counting.config import (
    AbsenceConfig,
    DetectorConfig,
    HardCountConfig,
    ObjectCountConfig,
    PresenceConfig,
)
from alignprop_counting.detector import Detections, Predictions
from alignprop_counting.loading import load_detector
from alignprop_counting.prompt_reader import Request
from alignprop_counting.requests import RequestReader
from alignprop_counting.soft_count import soft_count
from alignprop_counting.vocabulary import Vocabulary


class DetectorReward(Reward):
    """Base of the rewards: the detector, and the mean over a sample's requests.

    A batch of B samples has N requests in all. Subclasses score all requests at once, so tensors over requests have
    shape (N,), and `samples` maps each request to its image.

    Args:
        config: the options.
        registry: where detectors and weight sets are looked up; None is the environment's.
    """

    Config: ClassVar[type[RewardConfig]] = DetectorConfig
    config: DetectorConfig

    def __init__(self, config: RewardConfig | None = None, registry: Registry | None = None) -> None:
        super().__init__(config)
        self.detector = load_detector(self.config, registry or default_registry())
        self.reader = RequestReader(self.config, Vocabulary(self.detector.names))

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        """Read the sample's requests.

        Raises:
            PromptError: they are missing or not clear.
        """
        self.requests(prompt, metadata)

    def describe_preprocessing(self) -> dict[str, Any]:
        """Describe the detector's resizing and normalization."""
        return self.detector.describe_preprocessing()

    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) scores, the mean over each sample's requests; float32, or float64 if the images are.

        Raises:
            PromptError: a sample's requests are missing or not clear.
        """
        dtype = torch.float64 if batch.images.dtype == torch.float64 else torch.float32
        if len(batch) == 0:
            return batch.images.sum((1, 2, 3)).to(dtype)  # (0,), attached to the graph
        requests = [self.requests(p, m) for p, m in zip(batch.prompts, batch.metadata, strict=True)]
        # One row per request, over all samples; a sample with k requests weighs each of them 1 / k.
        rows = [(i, one.class_id, one.count or 0, 1 / len(own)) for i, own in enumerate(requests) for one in own]
        device, images = batch.images.device, batch.images
        samples, class_ids, counts, weights = (
            torch.tensor(column, device=device) for column in zip(*rows, strict=True)
        )
        # Networks cache constants between calls. Created in inference mode, they would break a later backward pass.
        inference = torch.is_inference_mode_enabled()
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(torch.is_grad_enabled() and not inference),
            torch.autocast(device.type, enabled=False),  # log-odds near the threshold need float32
        ):
            values = self.values(self.detector(images), samples, class_ids, counts)  # (N,)
        values = values.to(dtype)
        return self.reduce(values, samples, weights.to(values), len(batch))

    @abstractmethod
    def requests(self, prompt: str, metadata: Mapping[str, Any]) -> tuple[Request, ...]:
        """Return the sample's requests that this reward scores; at least one."""

    @abstractmethod
    def values(self, predictions: Predictions, samples: Tensor, class_ids: Tensor, counts: Tensor) -> Tensor:
        """Score N requests, (N,): sample `samples[i]` must have `counts[i]` objects of class `class_ids[i]`."""

    def reduce(self, values: Tensor, samples: Tensor, weights: Tensor, size: int) -> Tensor:
        """Reduce N values to (size,) scores: the mean over a sample's requests, so that all samples weigh the same."""
        # (N,) -> (B,): a scatter-add, since samples have different numbers of requests.
        return values.new_zeros(size).index_add(0, samples, values * weights)

    def detections(self, predictions: Predictions) -> Detections:
        """Return the hard detections, without a gradient."""
        return self.detector.detect(predictions, self.config.threshold, self.config.overlap)


class ObjectCount(DetectorReward):
    """Minus the Huber distance of the soft count from the requested number: 0 is best.

    score = -mean over requests of h(count - requested), h(d) = d^2 / (2 delta) up to delta, |d| - delta / 2 beyond;
    `count` is `alignprop_counting.soft_count.soft_count`. The unit is objects.
    """

    Config: ClassVar[type[RewardConfig]] = ObjectCountConfig
    config: ObjectCountConfig

    def requests(self, prompt: str, metadata: Mapping[str, Any]) -> tuple[Request, ...]:
        """Return the sample's requests, each with a count."""
        return self.reader.read(prompt, metadata, counts=True)

    def counts(self, predictions: Predictions, samples: Tensor, class_ids: Tensor) -> Tensor:
        """Return (N,) soft counts of class `class_ids[i]` in sample `samples[i]`."""
        return soft_count(
            # (B, A, C) -> (N, A): for each request, its class at every location of its image.
            predictions.log_odds[samples, :, class_ids],
            predictions.boxes[samples],
            predictions.one_to_one,
            threshold=self.config.threshold,
            sharpness=self.config.sharpness,
            overlap=self.config.overlap,
        )

    def values(self, predictions: Predictions, samples: Tensor, class_ids: Tensor, counts: Tensor) -> Tensor:
        """Return (N,) minus the Huber distance."""
        found = self.counts(predictions, samples, class_ids)
        # smooth_l1 with beta = delta is the Huber loss divided by delta: slope 1 far away, whatever delta is.
        return -F.smooth_l1_loss(found, counts.to(found), beta=self.config.delta, reduction="none")


class HardCount(DetectorReward):
    """The detector's own objects counted: the true measure beside `object_count`, without a gradient.

    `measure`: "exact" is 1 if every request is met exactly, else 0, so its mean is the accuracy of the count; "error"
    is minus the mean absolute error; "count" is the number of objects of the requested classes.
    """

    Config: ClassVar[type[RewardConfig]] = HardCountConfig
    config: HardCountConfig

    def requests(self, prompt: str, metadata: Mapping[str, Any]) -> tuple[Request, ...]:
        """Return the sample's requests; "count" needs no number."""
        return self.reader.read(prompt, metadata, counts=self.config.measure != "count")

    @torch.no_grad()
    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) measures; float32, or float64 if the images are."""
        return super().score(batch)

    def values(self, predictions: Predictions, samples: Tensor, class_ids: Tensor, counts: Tensor) -> Tensor:
        """Return (N,) counts, or minus the distances from the requested numbers."""
        found = self.detections(predictions).count(samples, class_ids)
        return found if self.config.measure == "count" else -(found - counts).abs()

    def reduce(self, values: Tensor, samples: Tensor, weights: Tensor, size: int) -> Tensor:
        """Return (size,): the mean error, the sum of the counts, or whether there is no error at all."""
        if self.config.measure == "error":
            return super().reduce(values, samples, weights, size)
        total = values.new_zeros(size).index_add(0, samples, values)
        # No value of "exact" is positive, so a sum of 0 means that every request is met.
        return total if self.config.measure == "count" else (total == 0).to(values)


class ObjectPresence(DetectorReward):
    """Log-probability of the detector's best location for the object: 0 is best.

    score = mean over requested classes of log p, p the highest probability of the class at any location. Its slope in
    the class logit is 1 - p, so the gradient is largest where nothing is detected yet. Counts do not matter, but
    classes that the prompt excludes are left out.
    """

    Config: ClassVar[type[RewardConfig]] = PresenceConfig

    def requests(self, prompt: str, metadata: Mapping[str, Any]) -> tuple[Request, ...]:
        """Return the classes that must be present."""
        return _select(self.reader.read(prompt, metadata), absent=False, prompt=prompt)

    def values(self, predictions: Predictions, samples: Tensor, class_ids: Tensor, counts: Tensor) -> Tensor:
        """Return (N,) log-probabilities."""
        # (B, A, C) -> (N, A) -> (N,); logsigmoid of log-odds stays finite where log(p) would not.
        return F.logsigmoid(predictions.log_odds[samples, :, class_ids].amax(1))


class ObjectAbsence(DetectorReward):
    """Log-probability that the detector's best location does not show the object: 0 is best.

    score = mean over classes of log(1 - p), p as for `object_presence`. With `source: prompt` the classes are those
    the prompt excludes ("no dogs", "without a cat"); with `objects` or metadata, all that are given.
    """

    Config: ClassVar[type[RewardConfig]] = AbsenceConfig

    def requests(self, prompt: str, metadata: Mapping[str, Any]) -> tuple[Request, ...]:
        """Return the classes that must be absent."""
        return _absent(self.reader, prompt, metadata)

    def values(self, predictions: Predictions, samples: Tensor, class_ids: Tensor, counts: Tensor) -> Tensor:
        """Return (N,) log-probabilities."""
        # 1 - sigmoid(x) = sigmoid(-x).
        return F.logsigmoid(-predictions.log_odds[samples, :, class_ids].amax(1))


class HardPresence(DetectorReward):
    """Fraction of the requested classes that the detector reports: the measure beside `object_presence`."""

    Config: ClassVar[type[RewardConfig]] = PresenceConfig

    def requests(self, prompt: str, metadata: Mapping[str, Any]) -> tuple[Request, ...]:
        """Return the classes that must be present."""
        return _select(self.reader.read(prompt, metadata), absent=False, prompt=prompt)

    @torch.no_grad()
    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) fractions in [0, 1]; float32, or float64 if the images are."""
        return super().score(batch)

    def values(self, predictions: Predictions, samples: Tensor, class_ids: Tensor, counts: Tensor) -> Tensor:
        """Return (N,): 1 if there is an object, else 0."""
        return (self.detections(predictions).count(samples, class_ids) > 0).float()


class HardAbsence(DetectorReward):
    """Fraction of the unwanted classes that the detector does not report: the measure beside `object_absence`."""

    Config: ClassVar[type[RewardConfig]] = AbsenceConfig

    def requests(self, prompt: str, metadata: Mapping[str, Any]) -> tuple[Request, ...]:
        """Return the classes that must be absent."""
        return _absent(self.reader, prompt, metadata)

    @torch.no_grad()
    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) fractions in [0, 1]; float32, or float64 if the images are."""
        return super().score(batch)

    def values(self, predictions: Predictions, samples: Tensor, class_ids: Tensor, counts: Tensor) -> Tensor:
        """Return (N,): 1 if there is no object, else 0."""
        return (self.detections(predictions).count(samples, class_ids) == 0).float()


def _absent(reader: RequestReader, prompt: str, metadata: Mapping[str, Any]) -> tuple[Request, ...]:
    requests = reader.read(prompt, metadata)
    given = reader.class_ids is not None or reader.config.source != "prompt"
    return requests if given else _select(requests, absent=True, prompt=prompt)


def _select(requests: tuple[Request, ...], *, absent: bool, prompt: str) -> tuple[Request, ...]:
    """Return the requests for none, or those for some; `PromptError` if there are none of that kind."""
    found = tuple(request for request in requests if (request.count == 0) == absent)
    if not found:
        wanted = 'no object that must be absent ("no dogs")' if absent else "no object that must be present"
        raise PromptError(f'The prompt "{prompt[:80]}" names {wanted}. The option objects can set the class.')
    return found
