"""From options and a batch to wishes: config, metadata or prompt. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignprop_core.errors import ConfigError, PromptError
from alignprop_counting.config import DetectorConfig, NumberConfig
from alignprop_counting.numerals import MOST, Amount
from alignprop_counting.wishes import Vocabulary, Wish


class WishReader:
    """Reads what each sample asks for; the fixed part is checked when it is built.

    Args:
        config: the reward's options.
        vocabulary: the detector's class names.

    Raises:
        ConfigError: a class the detector does not know.
    """

    def __init__(self, config: DetectorConfig, vocabulary: Vocabulary) -> None:
        self.config, self.vocabulary = config, vocabulary
        names = config.names
        self.kinds = None if names is None else tuple(vocabulary.kind(name, "options.objects") for name in names)
        if self.kinds is not None and len(set(self.kinds)) < len(self.kinds):
            raise ConfigError(f"options.objects: {', '.join(names or ())} name a class twice.")
        self.numbers = config.numbers if isinstance(config, NumberConfig) else None

    def read(self, prompt: str, metadata: Mapping[str, Any]) -> tuple[Wish, ...]:
        """Read a sample's wishes; at least one, numbers possibly open.

        Raises:
            PromptError: the prompt or metadata names no class the detector knows, or it cannot be told whether the
                prompt wants it.
        """
        mentioned: tuple[Wish, ...] = ()
        if self.config.source == "prompt" and (self.kinds is None or self.numbers is None):
            mentioned = self.vocabulary.read(prompt)
        kinds = self.kinds
        if kinds is None:
            kinds = (
                self._kinds_of(metadata) if self.config.source == "metadata" else tuple(wish.kind for wish in mentioned)
            )
        if not kinds:
            raise PromptError(
                f'The prompt "{_short(prompt)}" names no class the detector knows.{self.vocabulary.hint_for(prompt)} '
                "Or fix the class with the option objects."
            )
        if self.kinds is None:
            for wish in mentioned:
                if wish.doubt is not None and wish.doubt.wanted:
                    raise PromptError(self._doubtful(wish, prompt))
        numbers = self._read_numbers(kinds, mentioned, prompt, metadata)
        return tuple(Wish(kind, number.number, number.doubt) for kind, number in zip(kinds, numbers, strict=True))

    def counted(self, prompt: str, metadata: Mapping[str, Any]) -> tuple[Wish, ...]:
        """Read a sample's wishes, each with a number; `PromptError` if one is open or in doubt."""
        wishes = self.read(prompt, metadata)
        for wish in wishes:
            if wish.doubt is not None:
                raise PromptError(self._doubtful(wish, prompt))
            if wish.number is None:
                name = self.vocabulary.names[wish.kind]
                if self.config.source == "metadata":
                    raise PromptError(f'The metadata of "{_short(prompt)}" does not say how many ("{name}").')
                raise PromptError(
                    f'The prompt "{_short(prompt)}" does not say how many ("{name}"). Write a number before the noun '
                    '("three foxes", "3 dogs", "a cat"), or fix it with the option number.'
                )
        return wishes

    def _doubtful(self, wish: Wish, prompt: str) -> str:
        name, doubt = self.vocabulary.names[wish.kind], wish.doubt
        assert doubt is not None
        return (
            f'The prompt "{_short(prompt)}" says "{doubt.words}" ("{name}"): {doubt.reason}. Write one whole number '
            '("three foxes", "250 birds", "no dogs"), or set the options objects and number, or give both in the '
            "metadata (source: metadata)."
        )

    def _read_numbers(
        self, kinds: Sequence[int], mentioned: Sequence[Wish], prompt: str, metadata: Mapping[str, Any]
    ) -> Sequence[Amount]:
        numbers: Sequence[Amount]
        found = {wish.kind: Amount(wish.number, wish.doubt) for wish in mentioned}
        if self.numbers is not None:
            numbers = [Amount(number) for number in self.numbers]
        elif self.config.source == "metadata" and isinstance(self.config, NumberConfig):
            numbers = [Amount(number) for number in self._numbers_of(metadata, self.config.number_key)]
        else:
            numbers = [found.get(kind, Amount(None)) for kind in kinds]
            asked = self.config.source == "prompt" and isinstance(self.config, NumberConfig)
            if asked and len(kinds) == 1 and kinds[0] not in found:
                # The prompt calls the object by another word ("three robins" for bird).
                numbers = [self.vocabulary.only_number(prompt)]
        if len(numbers) == 1:
            return [numbers[0]] * len(kinds)
        if len(numbers) != len(kinds):
            raise PromptError(f"{len(kinds)} objects but {len(numbers)} numbers in the metadata of a sample.")
        return numbers

    def _kinds_of(self, metadata: Mapping[str, Any]) -> tuple[int, ...]:
        key = self.config.object_key
        value = metadata.get(key)
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
            raise PromptError(_missing(key, value, metadata, "a class name or a list of them", "object_key"))
        kinds = tuple(self.vocabulary.kind(name, f'metadata "{key}"') for name in names)
        if len(set(kinds)) < len(kinds):
            raise PromptError(f'The metadata key "{key}" of a prompt is {value!r}; it names a class twice.')
        return kinds

    @staticmethod
    def _numbers_of(metadata: Mapping[str, Any], key: str) -> list[int]:
        value = metadata.get(key)
        numbers: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
        if not numbers or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= MOST for n in numbers):
            raise PromptError(
                _missing(key, value, metadata, f"a whole number from 0 to {MOST} or a list of them", "number_key")
            )
        return numbers


def _missing(key: str, value: object, metadata: Mapping[str, Any], wanted: str, option: str) -> str:
    if key in metadata:
        return f'The metadata key "{key}" of a prompt is {value!r}; it must be {wanted}.'
    keys = ", ".join(metadata) or "none"
    return f'A prompt has no metadata key "{key}" ({wanted}); its keys: {keys}. The option {option} names the key.'


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 80 else prompt[:77] + "..."
