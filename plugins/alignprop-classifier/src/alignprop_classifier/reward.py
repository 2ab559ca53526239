"""The rewards: how probable the wanted class is, with a gradient; and whether it is the first choice, without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import functional_call
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from alignprop_classifier.config import ClassifierAccuracyConfig, ClassifierConfig, ImageClassifierConfig
from alignprop_classifier.names import ClassNames, Wanted, imagenet_words
from alignprop_classifier.network import logits_of
from alignprop_classifier.sources import load_classifier
from alignprop_core.errors import ConfigError, PromptError
from alignprop_core.reward import ImageBatch, Reward
from alignprop_core.specs import RewardConfig


class _Classifier(Reward):
    """The network, its classes, and which of them a sample wants."""

    Config: ClassVar[type[RewardConfig]] = ClassifierConfig
    config: ClassifierConfig

    def __init__(self, config: RewardConfig | None = None) -> None:
        super().__init__(config)
        found = load_classifier(self.config)
        self.network = found.network
        self.image_size, self.crop, self.fit = found.image_size, found.crop, found.fit
        self._floor = found.floor
        self.interpolation = InterpolationMode(found.interpolation)
        self.mean, self.std = list(found.mean), list(found.std)
        self.names = ClassNames(found.names, imagenet_words() if found.imagenet else None, self.config.synonyms)
        self._target = None if self.config.target is None else self.names.find(self.config.target, "options.target: ")
        self._read: dict[str, Wanted | None] = {}

    def preprocess(self, images: Tensor) -> Tensor:
        """Return what the network sees: (B, 3, S, S), normalised; the gradient reaches the given pixels.

        The picture is resized (antialiased) so that S / crop pixels are its shorter side, and the middle is taken;
        with `fit: squash` it is resized to a square whatever its shape, and the middle of that is taken.
        """
        whole = max(self.image_size, int(self.image_size / self.crop))
        size = [whole, whole] if self.fit == "squash" else [whole]
        resized = transforms.resize(images, size, interpolation=self.interpolation, antialias=True)
        kept = self._middle(resized)
        # Bicubic weights may overshoot 0 and 1 at edges. They are left so: cut off, saturated ground could not learn.
        seen: Tensor = transforms.normalize(kept, self.mean, self.std)
        return seen

    def _middle(self, resized: Tensor) -> Tensor:
        side = self.image_size
        if self._floor:
            top, left = ((length - side) // 2 for length in resized.shape[-2:])
            return resized[..., top : top + side, left : left + side]
        middle: Tensor = transforms.center_crop(resized, [side, side])
        return middle

    def logits(self, images: Tensor) -> Tensor:
        """Return (B, C) logits in float32, or float64 (network included) if the images are."""
        double = images.dtype == torch.float64
        # A mixed-precision run must not round what is compared between models.
        with torch.autocast(images.device.type, enabled=False):
            seen = self.preprocess(images if double else images.float())
            if not double:
                return logits_of(self.network(seen)).float()
            exact: dict[str, Any] = {
                name: value.double() if value.is_floating_point() else value
                for name, value in self.network.state_dict().items()
            }
            return logits_of(functional_call(self.network, exact, (seen,)))

    def wanted(self, batch: ImageBatch) -> list[Wanted | None]:
        """Return the class each sample wants: the option's, else its metadata's, else its prompt's.

        None stands for a prompt that names no class where `unnamed` is "ignore".

        Raises:
            PromptError: the metadata or the prompt names no class of the network.
        """
        return [self._wanted(p, metadata) for p, metadata in zip(batch.prompts, batch.metadata, strict=True)]

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        """Read the class a sample wants; `PromptError` if it names none of the network's."""
        self._wanted(prompt, metadata)

    def _wanted(self, prompt: str, metadata: Mapping[str, Any]) -> Wanted | None:
        if self._target is not None:
            return self._target
        key = self.config.metadata_key
        return self._from_metadata(metadata[key]) if key in metadata else self._from_prompt(prompt)

    def _from_metadata(self, name: object) -> Wanted:
        if not isinstance(name, (str, int)) or isinstance(name, bool):
            raise PromptError(
                f'Metadata key "{self.config.metadata_key}" holds {name!r}; it must be the name or number of a class.'
            )
        try:
            return self.names.find(name, f'Metadata key "{self.config.metadata_key}": ')
        except ConfigError as error:
            raise PromptError(str(error)) from error

    def _from_prompt(self, prompt: str) -> Wanted | None:
        if prompt not in self._read:
            try:
                self._read[prompt] = self.names.read(prompt)
            except PromptError:
                if self.config.unnamed == "refuse":
                    raise
                self._read[prompt] = None
        return self._read[prompt]

    def _members(self, wanted: list[Wanted | None], like: Tensor) -> Tensor:
        """Return (B, C), true where a class counts as wanted."""
        members = torch.zeros(like.shape, dtype=torch.bool)
        for row, want in enumerate(wanted):
            if want is not None:
                members[row, list(want.indices)] = True
        return members.to(like.device)


class ImageClassifier(_Classifier):
    """Log-probability of the wanted class under an image classifier; higher is better, at most 0.

    score = log sum over the wanted classes c of softmax(logits / temperature)_c

    A word may stand for several classes ("fox" for four of ImageNet's); their probabilities are added up. With
    `output: probability` the score is the probability itself, whose gradient vanishes where it is near 0.
    """

    Config: ClassVar[type[RewardConfig]] = ImageClassifierConfig
    config: ImageClassifierConfig

    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,); float32, or float64 if the images are. A sample that is ignored scores 0, without gradient."""
        wanted = self.wanted(batch)
        logits = self.logits(batch.images) / self.config.temperature
        members = self._members(wanted, logits)
        ignored = torch.tensor([want is None for want in wanted], device=logits.device)
        # Where nothing is wanted every class is put in, so that no row is empty: log 0 would poison the gradient.
        within = logits.masked_fill(~(members | ignored[:, None]), -torch.inf).logsumexp(dim=1)
        score = within - logits.logsumexp(dim=1)
        if self.config.output == "probability":
            score = score.exp()
        return torch.where(ignored, score * 0, score)


class ClassifierAccuracy(_Classifier):
    """1 where the wanted class is among the network's first `top_k` choices, 0 where it is not; for evaluations.

    Of a word that stands for several classes any counts. A sample that is ignored scores 0.
    """

    Config: ClassVar[type[RewardConfig]] = ClassifierAccuracyConfig
    config: ClassifierAccuracyConfig

    @torch.no_grad()
    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) ones and zeros; float32, or float64 if the images are."""
        logits = self.logits(batch.images)
        first = logits.topk(min(self.config.top_k, logits.shape[1]), dim=1).indices
        return self._members(self.wanted(batch), logits).gather(1, first).any(dim=1).to(logits.dtype)
