"""What a sample asks for: which objects and how many, read from a prompt. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from alignprop_core.errors import ConfigError, did_you_mean
from alignprop_counting.words import ARTICLES, GROUPS, NEGATIONS, number_of, plurals

_TOKEN = re.compile(r"[a-z0-9]+(?:[-'][a-z0-9]+)*|[^\sa-z0-9]")
_NO_ADJECTIVES = (
    "of and with in on at near by beside behind under over above below between from to into or but nor while as the "
    "is are this that these those his her its their my your"
)
_STOPS = frozenset(_NO_ADJECTIVES.split())
_REACH = 8
"""Most words between a number and its noun."""


@dataclass(frozen=True)
class Wish:
    """One thing asked for: a class by its index, and how many; None leaves the number open."""

    kind: int
    number: int | None


class Vocabulary:
    """A detector's class names, found in text in singular and plural.

    Args:
        names: class names in order. Names without letters, and `N/A`, stand for nothing and are never found.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._kinds: dict[str, int] = {}
        self._plural: dict[tuple[str, ...], int] = {}
        self._singular: dict[tuple[str, ...], int] = {}
        for kind, name in enumerate(self.names):
            words = " ".join(_TOKEN.findall(name.lower()))
            if name == "N/A" or not re.search("[a-z]", words):
                continue
            self._kinds.setdefault(words, kind)
            self._singular.setdefault(tuple(words.split()), kind)
            for form in plurals(words):
                self._plural.setdefault(tuple(form.split()), kind)
        self._longest = max((len(words) for words in (*self._singular, *self._plural)), default=0)

    def kind(self, name: str, where: str) -> int:
        """Return the index of a class by its name, singular or plural, in any case.

        Raises:
            ConfigError: the detector does not know it; `where` says who asked.
        """
        words = tuple(_TOKEN.findall(name.lower()))
        found = self._singular.get(words, self._plural.get(words))
        if found is None:
            raise ConfigError(f'{where}: the detector knows no class "{name}".{self.hint([name])}')
        return found

    def hint(self, words: Sequence[str]) -> str:
        """Suggest the nearest class name for one of the words, or list some names."""
        for word in sorted(words, key=len, reverse=True):
            nearest = did_you_mean(word.lower(), self._kinds)
            if nearest:
                return nearest
        known = list(self._kinds)
        return f" It knows {len(known)}: {', '.join(known[:10])}{', ...' if len(known) > 10 else ''}."

    def read(self, prompt: str) -> tuple[Wish, ...]:
        """Read the wishes of a prompt in the order of their first mention; several mentions of a class add up.

        `three foxes`, `3 dogs`, `a cat and two birds`, `no dogs`, `a dog without a cat`. A mention without a number
        leaves it open (None), unless another mention of the class has one.
        """
        tokens = _TOKEN.findall(prompt.lower())
        numbers: dict[int, int | None] = {}
        at = start = 0
        negated = False
        while at < len(tokens):
            kind, plural, length = self._match(tokens, at)
            if not length:
                at += 1
                continue
            number, denied = _number_before(tokens, start, at, plural)
            if number is None and negated and tokens[at - 1] in ("and", "or", "nor"):
                number, denied = 0, True  # "without cats or dogs"
            negated = denied
            before = numbers.get(kind)
            numbers[kind] = number if before is None else before + (number or 0)
            at += length
            start = at
        return tuple(Wish(kind, number) for kind, number in numbers.items())

    def only_number(self, prompt: str) -> int | None:
        """Return the one number the prompt holds (articles are none), or None if it holds none or several."""
        found = [number for token in _TOKEN.findall(prompt.lower()) if (number := number_of(token)) is not None]
        return found[0] if len(found) == 1 else None

    def _match(self, tokens: list[str], at: int) -> tuple[int, bool, int]:
        """Return the class named at a place, whether in the plural alone, and by how many words (0: none)."""
        for length in range(min(self._longest, len(tokens) - at), 0, -1):
            words = tuple(tokens[at : at + length])
            if words in self._singular:
                return self._singular[words], False, length
            if words in self._plural:
                return self._plural[words], True, length
        return -1, False, 0


def _number_before(tokens: list[str], start: int, at: int, plural: bool) -> tuple[int | None, bool]:
    """Find the number that belongs to the noun at `at`, looking back no further than `start`.

    Returns:
        the number, None if there is none; and whether the noun is negated ("no", "without").
    """
    for i in range(at - 1, max(start, at - _REACH) - 1, -1):
        word = tokens[i]
        before = tokens[i - 1] if i > start else ""
        if word in NEGATIONS:
            return 0, True
        if word in ARTICLES:
            if before in NEGATIONS:
                return 0, True
            # "a forest, foxes": a plural has no article of its own.
            return (None if plural else 1), False
        if word in GROUPS and (i == at - 1 or tokens[i + 1] == "of" or word == "dozen"):
            times = number_of(before)
            return GROUPS[word] * (1 if times is None else times), False
        number = number_of(word)
        if number is not None:
            return number, number == 0
        if word == "of" and before in GROUPS:
            continue
        # An enumeration's comma ends a noun phrase; "three small, red foxes" shows by its plural that it goes on.
        if word in _STOPS or (not word[0].isalnum() and word not in "'\"" and not (word == "," and plural)):
            return None, False
    return None, False
