"""The rewards image_classifier (differentiable log-probability of the target class) and classifier_accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import functional_call

from alignprop_classifier.class_names import ClassNames, TargetClass, imagenet_words
from alignprop_classifier.config import ClassifierAccuracyConfig, ClassifierConfig, ImageClassifierConfig
from alignprop_classifier.loading import load_classifier
from alignprop_classifier.network import logits_of
from alignprop_core.errors import ConfigError, PromptError, complaint
from alignprop_core.reward import ImageBatch, Reward
from alignprop_core.specs import RewardConfig


class _ClassifierReward(Reward):
    """Base class of both rewards: the network, its classes, and the target class of each sample."""

    Config: ClassVar[type[RewardConfig]] = ClassifierConfig
    config: ClassifierConfig

    def __init__(self, config: RewardConfig | None = None) -> None:
        super().__init__(config)
        classifier = load_classifier(self.config)
        self.network = classifier.network
        assert classifier.preprocessing is not None
        self.preprocess = classifier.preprocessing
        words = imagenet_words() if classifier.imagenet else None
        self.names = ClassNames(classifier.names, words, self.config.synonyms)
        self._target = None if self.config.target is None else self.names.find(self.config.target, "options.target: ")
        self._prompt_targets: dict[str, TargetClass | None] = {}

    def describe_preprocessing(self) -> dict[str, Any]:
        """Describe resizing, cropping and normalization, as the model's library does them."""
        return self.preprocess.describe()

    def logits(self, images: Tensor) -> Tensor:
        """Return the (B, C) logits of (B, 3, H, W) images; float32, or computed in float64 if they are."""
        double = images.dtype == torch.float64
        # No autocast: scores must not depend on the precision of the run.
        with torch.autocast(images.device.type, enabled=False):
            inputs = self.preprocess(images if double else images.float())
            try:
                if not double:
                    return logits_of(self.network(inputs)).float()
                exact: dict[str, Any] = {
                    name: value.double() if value.is_floating_point() else value
                    for name, value in self.network.state_dict().items()
                }
                return logits_of(functional_call(self.network, exact, (inputs.double(),)))
            except (RuntimeError, ValueError) as error:
                # Loading has run the network once, at the size that its preprocessing gives.
                if isinstance(error, torch.OutOfMemoryError) or tuple(inputs.shape[2:]) == self.preprocess.size:
                    raise
                raise ConfigError(
                    f"The classifier does not accept images of {inputs.shape[2]} x {inputs.shape[3]} pixels, and its "
                    f"preprocessing does not resize them: {complaint(error)}. Set options.image_size and options.fit."
                ) from error

    def targets(self, batch: ImageBatch) -> list[TargetClass | None]:
        """Return the target class of each sample: from the option `target`, its metadata, or its prompt, in this order.

        A prompt that names no class gives None if the option `unnamed` is "ignore".

        Raises:
            PromptError: the metadata or the prompt of a sample names no class of the network.
        """
        return [self._target_of(p, metadata) for p, metadata in zip(batch.prompts, batch.metadata, strict=True)]

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        """Raise `PromptError` if the prompt and metadata of a sample name no class of the network."""
        self._target_of(prompt, metadata)

    def _target_of(self, prompt: str, metadata: Mapping[str, Any]) -> TargetClass | None:
        if self._target is not None:
            return self._target
        key = self.config.metadata_key
        return self._from_metadata(metadata[key]) if key in metadata else self._from_prompt(prompt)

    def _from_metadata(self, name: object) -> TargetClass:
        if not isinstance(name, (str, int)) or isinstance(name, bool):
            raise PromptError(
                f'Metadata key "{self.config.metadata_key}" is {name!r}; it must be the name or index of a class.'
            )
        try:
            return self.names.find(name, f'Metadata key "{self.config.metadata_key}": ')
        except ConfigError as error:
            raise PromptError(str(error)) from error

    def _from_prompt(self, prompt: str) -> TargetClass | None:
        if prompt not in self._prompt_targets:
            try:
                self._prompt_targets[prompt] = self.names.find_in_prompt(prompt)
            except PromptError:
                if self.config.unnamed == "refuse":
                    raise
                self._prompt_targets[prompt] = None
        return self._prompt_targets[prompt]

    def _target_mask(self, targets: list[TargetClass | None], logits: Tensor) -> Tensor:
        """Return a (B, C) boolean mask, true for the target classes of each sample."""
        mask = torch.zeros(logits.shape, dtype=torch.bool)
        for row, target in enumerate(targets):
            if target is not None:
                mask[row, list(target.indices)] = True
        return mask.to(logits.device)


class ImageClassifier(_ClassifierReward):
    """Log-probability of the target class under an image classifier; higher is better, at most 0.

    score = log sum_{c in target} softmax(logits / temperature)_c

    A word can mean several classes ("fox" means four of ImageNet's); their probabilities are summed. With
    `output: probability` the score is the probability itself, whose gradient vanishes near 0.

    Args:
        config: the options; defaults if None.

    Raises:
        ConfigError: the model, a class name or the image size is invalid.
        WeightsError: the weights are not on this machine, damaged, or do not fit the model.
    """

    Config: ClassVar[type[RewardConfig]] = ImageClassifierConfig
    config: ImageClassifierConfig

    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) scores; float32, or float64 if the images are. An ignored sample scores 0, without gradient."""
        targets = self.targets(batch)
        logits = self.logits(batch.images) / self.config.temperature
        mask = self._target_mask(targets, logits)  # (B, C)
        ignored = torch.tensor([target is None for target in targets], device=logits.device)
        # For an ignored sample every class counts as target: an empty row would give log 0 and a NaN gradient.
        target_logits = logits.masked_fill(~(mask | ignored[:, None]), -torch.inf)
        score = target_logits.logsumexp(dim=1) - logits.logsumexp(dim=1)  # (B,)
        if self.config.output == "probability":
            score = score.exp()
        return torch.where(ignored, score * 0, score)


class ClassifierAccuracy(_ClassifierReward):
    """Top-k accuracy, for evaluations: 1 if a target class is among the `top_k` most probable classes, else 0.

    If a word means several classes, any of them counts. An ignored sample scores 0. There is no gradient.

    Args:
        config: the options; defaults if None.

    Raises:
        ConfigError: the model, a class name or the image size is invalid.
        WeightsError: the weights are not on this machine, damaged, or do not fit the model.
    """

    Config: ClassVar[type[RewardConfig]] = ClassifierAccuracyConfig
    config: ClassifierAccuracyConfig

    @torch.no_grad()
    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) ones and zeros; float32, or float64 if the images are."""
        logits = self.logits(batch.images)
        top = logits.topk(min(self.config.top_k, logits.shape[1]), dim=1).indices  # (B, k)
        return self._target_mask(self.targets(batch), logits).gather(1, top).any(dim=1).to(logits.dtype)
