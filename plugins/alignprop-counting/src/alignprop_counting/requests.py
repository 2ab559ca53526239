"""What each sample requests: from the options, the metadata or the prompt. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from alignprop_core.errors import ConfigError, PromptError
from alignprop_counting.config import DetectorConfig, NumberConfig
from alignprop_counting.phrases import MAX_COUNT, ends_phrase
from alignprop_counting.prompt_reader import Request, read_prompt
from alignprop_counting.vocabulary import Vocabulary, split


class RequestReader:
    """Reads what each sample requests; the part that the options fix is checked when it is built.

    Args:
        config: the reward's options.
        vocabulary: the detector's class names.

    Raises:
        ConfigError: a class the detector does not have, or one named twice.
    """

    def __init__(self, config: DetectorConfig, vocabulary: Vocabulary) -> None:
        self.config, self.vocabulary = config, vocabulary
        names = config.names
        self.class_ids = None if names is None else tuple(vocabulary.class_id(n, "options.objects") for n in names)
        if self.class_ids is not None and len(set(self.class_ids)) < len(self.class_ids):
            raise ConfigError(f"options.objects: {', '.join(names or ())} name a class twice.")
        self.numbers = config.numbers if isinstance(config, NumberConfig) else None

    def read(self, prompt: str, metadata: Mapping[str, Any], *, counts: bool = False) -> tuple[Request, ...]:
        """Read a sample's requests, at least one; with `counts` each has a count.

        Raises:
            PromptError: no class of the detector is named, it is not clear whether one is wanted, or (with `counts`)
                how many are wanted is not clear.
        """
        requests = self._with_numbers(self._classes(prompt, metadata), metadata)
        for request in requests:
            # An unclear object matters only where the prompt chooses the classes.
            if (request.problem == "object" and self.class_ids is None) or (counts and request.count is None):
                raise PromptError(self._refusal(request, prompt))
        return requests

    def _classes(self, prompt: str, metadata: Mapping[str, Any]) -> tuple[Request, ...]:
        if self.config.source == "metadata":
            ids = self._metadata_classes(metadata) if self.class_ids is None else self.class_ids
            return tuple(Request(class_id, None) for class_id in ids)
        if self.config.source == "config" or (self.class_ids is not None and self.numbers is not None):
            return tuple(Request(class_id, None) for class_id in self.class_ids or ())
        found = read_prompt(prompt, self.vocabulary)
        if self.class_ids is not None:
            by_class = {request.class_id: request for request in found}
            return tuple(by_class.get(i, Request(i, None)) for i in self.class_ids)
        if not found:
            nouns = [word for word in split(prompt) if not ends_phrase(word)]  # and adjectives, but no "four" or "with"
            raise PromptError(
                f'The prompt "{_short(prompt)}" names no class of the detector.{self.vocabulary.hint(nouns)} '
                "The option objects can set the class."
            )
        return found

    def _with_numbers(self, requests: tuple[Request, ...], metadata: Mapping[str, Any]) -> tuple[Request, ...]:
        numbers: Sequence[int]
        if self.numbers is not None:
            numbers = self.numbers
        elif self.config.source == "metadata" and isinstance(self.config, NumberConfig):
            numbers = _metadata_numbers(metadata, self.config.number_key)
        else:
            return requests
        if len(numbers) == 1:
            numbers = [*numbers] * len(requests)
        if len(numbers) != len(requests):
            raise PromptError(f"{len(requests)} objects but {len(numbers)} numbers in the metadata of a sample.")
        return tuple(replace(request, count=number) for request, number in zip(requests, numbers, strict=True))

    def _refusal(self, request: Request, prompt: str) -> str:
        name = self.vocabulary.names[request.class_id]
        if self.config.source == "metadata":
            return f'The metadata of "{_short(prompt)}" does not say how many ("{name}").'
        quoted = f' with "{request.words}"' if request.words else ""
        return (
            f'The prompt "{_short(prompt)}" does not say clearly how many ("{name}"){quoted}. Write one exact number '
            'before the noun ("three foxes", "250 birds", "a pair of cats", "no dogs"), or give object and number in '
            "the metadata of a JSONL prompt file (source: metadata), or set the options objects and number."
        )

    def _metadata_classes(self, metadata: Mapping[str, Any]) -> tuple[int, ...]:
        key = self.config.object_key
        value = metadata.get(key)
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
            raise PromptError(_wrong_value(key, metadata, "a class name or a list of them", "object_key"))
        ids = tuple(self.vocabulary.class_id(name, f'metadata "{key}"') for name in names)
        if len(set(ids)) < len(ids):
            raise PromptError(f'The metadata key "{key}" of a prompt is {value!r}; it names a class twice.')
        return ids


def _metadata_numbers(metadata: Mapping[str, Any], key: str) -> list[int]:
    value = metadata.get(key)
    numbers: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if not numbers or not all(type(number) is int and 0 <= number <= MAX_COUNT for number in numbers):
        expected = f"a whole number from 0 to {MAX_COUNT} or a list of them"
        raise PromptError(_wrong_value(key, metadata, expected, "number_key"))
    return numbers


def _wrong_value(key: str, metadata: Mapping[str, Any], expected: str, option: str) -> str:
    if key in metadata:
        return f'The metadata key "{key}" of a prompt is {metadata[key]!r}; it must be {expected}.'
    keys = ", ".join(metadata) or "none"
    return f'A prompt has no metadata key "{key}" ({expected}); its keys: {keys}. The option {option} names the key.'


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 80 else prompt[:77] + "..."
