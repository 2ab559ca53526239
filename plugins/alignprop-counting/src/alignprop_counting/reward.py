"""The rewards: how near the count is to the number wished for; whether something is there; whether it is not."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from alignprop_core.errors import PromptError
from alignprop_core.registry import Registry, default_registry
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
from alignprop_counting.soft_count import soft_count
from alignprop_counting.wished import WishReader
from alignprop_counting.wishes import Vocabulary, Wish


class DetectorReward(Reward):
    """What the rewards have in common: the detector, and the mean over a sample's wishes.

    Args:
        config: the options.
        registry: where detectors and sets of weights are looked up; the environment's if None.
    """

    Config: ClassVar[type[RewardConfig]] = DetectorConfig
    config: DetectorConfig

    def __init__(self, config: RewardConfig | None = None, registry: Registry | None = None) -> None:
        super().__init__(config)
        self.detector = load_detector(self.config, registry or default_registry())
        self.reader = WishReader(self.config, Vocabulary(self.detector.names))

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        """Read the sample's wishes; `PromptError` if it does not say what is needed."""
        self.wishes(prompt, metadata)

    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) scores, the mean over each sample's wishes; float32, or float64 if the images are.

        Raises:
            PromptError: a sample does not say what is needed.
        """
        dtype = torch.float64 if batch.images.dtype == torch.float64 else torch.float32
        if len(batch) == 0:
            return batch.images.sum((1, 2, 3)).to(dtype)
        wishes = [self.wishes(p, m) for p, m in zip(batch.prompts, batch.metadata, strict=True)]
        rows = [(i, wish.kind, wish.number or 0, 1 / len(own)) for i, own in enumerate(wishes) for wish in own]
        device, images = batch.images.device, batch.images
        samples, kinds, numbers, shares = (torch.tensor(column, device=device) for column in zip(*rows, strict=True))
        # Networks keep constants from one call to the next; made in inference mode they would break a later backward.
        inference = torch.is_inference_mode_enabled()
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(torch.is_grad_enabled() and not inference),
            torch.autocast(device.type, enabled=False),
        ):
            values = self.values(self.detector(images), samples, kinds, numbers)
        values = values.to(dtype)
        return self.joined(values, samples, shares.to(values), len(batch))

    @abstractmethod
    def wishes(self, prompt: str, metadata: Mapping[str, Any]) -> tuple[Wish, ...]:
        """Return the sample's wishes this reward looks at; at least one."""

    @abstractmethod
    def values(self, predictions: Predictions, samples: Tensor, kinds: Tensor, numbers: Tensor) -> Tensor:
        """Score N wishes, (N,): sample `samples[i]` wants `numbers[i]` objects of class `kinds[i]`."""

    def joined(self, values: Tensor, samples: Tensor, shares: Tensor, size: int) -> Tensor:
        """Join N values to (size,) scores: their mean, so that a prompt of two wishes weighs as much as one of one."""
        return values.new_zeros(size).index_add(0, samples, values * shares)

    def detections(self, predictions: Predictions) -> Detections:
        """Return the hard detections, without a gradient."""
        return self.detector.detect(predictions, self.config.threshold, self.config.overlap)


class ObjectCount(DetectorReward):
    """Minus the Huber distance of the soft count from the number wished for: 0 is best.

    score = -mean over wishes of h(count - wanted), h(d) = d^2 / (2 delta) up to delta, |d| - delta / 2 beyond; `count`
    is `alignprop_counting.soft_count.soft_count`. The unit is objects.
    """

    Config: ClassVar[type[RewardConfig]] = ObjectCountConfig
    config: ObjectCountConfig

    def wishes(self, prompt: str, metadata: Mapping[str, Any]) -> tuple[Wish, ...]:
        """Return the sample's wishes, each with a number."""
        return self.reader.counted(prompt, metadata)

    def counts(self, predictions: Predictions, samples: Tensor, kinds: Tensor) -> Tensor:
        """Return (N,) soft counts of class `kinds[i]` in sample `samples[i]`."""
        return soft_count(
            predictions.log_odds[samples, :, kinds],
            predictions.boxes[samples],
            predictions.one_to_one,
            threshold=self.config.threshold,
            sharpness=self.config.sharpness,
            overlap=self.config.overlap,
        )

    def values(self, predictions: Predictions, samples: Tensor, kinds: Tensor, numbers: Tensor) -> Tensor:
        """Return (N,) minus the Huber distance."""
        counts = self.counts(predictions, samples, kinds)
        return -F.smooth_l1_loss(counts, numbers.to(counts), beta=self.config.delta, reduction="none")


class HardCount(DetectorReward):
    """The detector's own objects counted: the true measure beside `object_count`, without a gradient.

    `measure`: "exact" is 1 if every wish is met exactly, else 0, so its mean is the hard count accuracy; "error" is
    minus the mean absolute error; "count" is how many objects of the wished classes there are.
    """

    Config: ClassVar[type[RewardConfig]] = HardCountConfig
    config: HardCountConfig

    def wishes(self, prompt: str, metadata: Mapping[str, Any]) -> tuple[Wish, ...]:
        """Return the sample's wishes; to count alone no number is needed."""
        return (self.reader.read if self.config.measure == "count" else self.reader.counted)(prompt, metadata)

    @torch.no_grad()
    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) measures; float32, or float64 if the images are."""
        return super().score(batch)

    def values(self, predictions: Predictions, samples: Tensor, kinds: Tensor, numbers: Tensor) -> Tensor:
        """Return (N,) counts, or minus the distances from the numbers."""
        counts = self.detections(predictions).count(samples, kinds)
        return counts if self.config.measure == "count" else -(counts - numbers).abs()

    def joined(self, values: Tensor, samples: Tensor, shares: Tensor, size: int) -> Tensor:
        """Return (size,): the mean error, or the sum of the counts, or whether there is no error at all."""
        if self.config.measure == "error":
            return super().joined(values, samples, shares, size)
        total = values.new_zeros(size).index_add(0, samples, values)
        return total if self.config.measure == "count" else (total == 0).to(values)


class ObjectPresence(DetectorReward):
    """Log-probability that the detector's best place shows the object: 0 is best.

    score = mean over wished classes of log p, p the highest probability of the class at any place. Its slope in the
    class's logit is 1 - p, so it pulls hardest where there is nothing yet. Numbers do not matter, but classes that the
    prompt negates are left out.
    """

    Config: ClassVar[type[RewardConfig]] = PresenceConfig

    def wishes(self, prompt: str, metadata: Mapping[str, Any]) -> tuple[Wish, ...]:
        """Return the classes that shall be there."""
        return _those(self.reader.read(prompt, metadata), absent=False, prompt=prompt)

    def values(self, predictions: Predictions, samples: Tensor, kinds: Tensor, numbers: Tensor) -> Tensor:
        """Return (N,) log-probabilities."""
        return F.logsigmoid(predictions.log_odds[samples, :, kinds].amax(1))


class ObjectAbsence(DetectorReward):
    """Log-probability that the detector's best place does not show the object: 0 is best.

    score = mean over classes of log(1 - p), p as for `object_presence`. With `source: prompt` the classes are those
    the prompt negates ("no dogs", "without a cat"); with `objects` or metadata, all that are given.
    """

    Config: ClassVar[type[RewardConfig]] = AbsenceConfig

    def wishes(self, prompt: str, metadata: Mapping[str, Any]) -> tuple[Wish, ...]:
        """Return the classes that shall not be there."""
        return _absent(self.reader, prompt, metadata)

    def values(self, predictions: Predictions, samples: Tensor, kinds: Tensor, numbers: Tensor) -> Tensor:
        """Return (N,) log-probabilities."""
        return F.logsigmoid(-predictions.log_odds[samples, :, kinds].amax(1))


class HardPresence(DetectorReward):
    """Share of the wished classes of which the detector reports an object: the measure beside `object_presence`."""

    Config: ClassVar[type[RewardConfig]] = PresenceConfig

    def wishes(self, prompt: str, metadata: Mapping[str, Any]) -> tuple[Wish, ...]:
        """Return the classes that shall be there."""
        return _those(self.reader.read(prompt, metadata), absent=False, prompt=prompt)

    @torch.no_grad()
    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) shares in [0, 1]; float32, or float64 if the images are."""
        return super().score(batch)

    def values(self, predictions: Predictions, samples: Tensor, kinds: Tensor, numbers: Tensor) -> Tensor:
        """Return (N,): 1 where there is an object, else 0."""
        return (self.detections(predictions).count(samples, kinds) > 0).float()


class HardAbsence(DetectorReward):
    """Share of the unwanted classes of which the detector reports no object: the measure beside `object_absence`."""

    Config: ClassVar[type[RewardConfig]] = AbsenceConfig

    def wishes(self, prompt: str, metadata: Mapping[str, Any]) -> tuple[Wish, ...]:
        """Return the classes that shall not be there."""
        return _absent(self.reader, prompt, metadata)

    @torch.no_grad()
    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) shares in [0, 1]; float32, or float64 if the images are."""
        return super().score(batch)

    def values(self, predictions: Predictions, samples: Tensor, kinds: Tensor, numbers: Tensor) -> Tensor:
        """Return (N,): 1 where there is no object, else 0."""
        return (self.detections(predictions).count(samples, kinds) == 0).float()


def _absent(reader: WishReader, prompt: str, metadata: Mapping[str, Any]) -> tuple[Wish, ...]:
    wishes = reader.read(prompt, metadata)
    chosen = reader.kinds is not None or reader.config.source != "prompt"
    return wishes if chosen else _those(wishes, absent=True, prompt=prompt)


def _those(wishes: tuple[Wish, ...], *, absent: bool, prompt: str) -> tuple[Wish, ...]:
    """Return the wishes for none, or those for some; `PromptError` if there are none such."""
    found = tuple(wish for wish in wishes if (wish.number == 0) == absent)
    if not found:
        wanted = 'no object that must be absent ("no dogs")' if absent else "no object that must be there"
        raise PromptError(f'The prompt "{prompt[:80]}" names {wanted}. Fix the class with the option objects.')
    return found
