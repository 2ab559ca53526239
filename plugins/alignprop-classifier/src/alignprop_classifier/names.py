"""From words to a classifier's classes: names, plurals, words that mean several classes. No torch.

ImageNet's classes are narrow ("kit fox", "tabby cat"), prompts are not ("three foxes"). A word may therefore stand for
several classes; what it is worth is their probability added up. `data/imagenet_words.json` says which for common
animals, and which of them ImageNet lacks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from alignprop_core.errors import ConfigError, PromptError

Key = tuple[str, ...]

_IRREGULAR = {
    "mouse": "mice", "louse": "lice", "goose": "geese", "mongoose": "mongooses", "ox": "oxen", "sheep": "sheep",
    "foot": "feet", "tooth": "teeth", "child": "children", "person": "people", "man": "men", "woman": "women",
    "wolf": "wolves", "calf": "calves", "leaf": "leaves", "loaf": "loaves", "knife": "knives", "shelf": "shelves",
    "scarf": "scarves", "wife": "wives", "deer": "deer",
}  # fmt: skip


class Wanted(NamedTuple):
    """A class, or several that count as one."""

    name: str
    indices: tuple[int, ...]


class Words(NamedTuple):
    """What a table of words says: the classes a word stands for, and why some words stand for none."""

    groups: Mapping[str, Sequence[str | int]]
    lacking: Mapping[str, str]


def plurals(word: str) -> set[str]:
    """Return the plural forms of a noun: ``fox`` -> ``foxes``; some have two (``fish``, ``fishes``)."""
    if word in _IRREGULAR:
        return {_IRREGULAR[word]}
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return {word + "es"} | ({word} if word.endswith("fish") else set())
    if re.search(r"[^aeiou]y$", word):
        return {word[:-1] + "ies"}
    return {word + "s"} | ({word + "es"} if word.endswith("o") else set())


def split(text: str) -> Key:
    """Return the words of a text, lower case, without punctuation: ``Shih-Tzu`` -> ``("shih", "tzu")``."""
    return tuple(re.findall(r"[^\W_]+", text.lower().replace("'", "")))


class ClassNames:
    """The classes of a network and every word that means one or several of them.

    Args:
        names: a name for each class, in the network's order; commas separate other names of the same class. A name
            that several classes have means any of them.
        words: words that stand for several classes, and words that stand for none; they come before the names.
        synonyms: the user's own words; they come before everything.
    """

    def __init__(
        self,
        names: Sequence[str],
        words: Words | None = None,
        synonyms: Mapping[str, Sequence[str | int] | str | int] | None = None,
    ) -> None:
        self.names = tuple(name.split(",")[0].strip() for name in names)
        known: dict[Key, tuple[int, ...]] = {}
        for index, name in enumerate(names):
            for other in name.split(","):
                if key := split(other):
                    known[key] = (*known.get(key, ()), index)
        self._plain = dict(known)
        self._known = self._singular = known  # already: the messages below look for the nearest name in it
        table = words or Words({}, {})
        lacking = {split(word): reason for word, reason in table.lacking.items()}
        for key in lacking:
            known.pop(key, None)
        for word, members in table.groups.items():
            known[split(word)] = self._members(members, word)
        for word, own in (synonyms or {}).items():
            key = split(word)
            if not key:
                raise ConfigError(f'options.synonyms: "{word}" is no word.')
            lacking.pop(key, None)
            known[key] = self._members([own] if isinstance(own, (str, int)) else own, word)
        self._known = {plural: known[key] for plural, key in _many(known).items()} | known
        plural_too = {plural: lacking[key] for plural, key in _many(lacking).items()} | lacking
        self._lacking = {key: reason for key, reason in plural_too.items() if key not in self._known}
        self._longest = max((len(key) for key in (*self._known, *self._lacking)), default=0)

    def _members(self, members: Iterable[str | int], word: str) -> tuple[int, ...]:
        found: list[int] = []
        for member in members:
            if isinstance(member, int):
                found += self._number(member, f"options.synonyms.{word}: ")
                continue
            first, _, last = (self._plain.get(split(part)) for part in member.partition(" .. "))
            if " .. " in member and first and last:
                found += range(first[0], last[0] + 1)
            elif " .. " not in member and first:
                found += first
            else:
                hint = self._hint(member)
                raise ConfigError(f'options.synonyms.{word}: the classifier has no class "{member}".{hint}')
        if not found:
            raise ConfigError(f"options.synonyms.{word} names no class; give it at least one.")
        return tuple(dict.fromkeys(found))

    def _number(self, index: int, where: str) -> tuple[int]:
        if not 0 <= index < len(self.names):
            raise ConfigError(
                f"{where}The classifier's classes are numbered 0 to {len(self.names) - 1}; there is no {index}. Choose "
                "one of those, or name the class."
            )
        return (index,)

    def _hint(self, name: str) -> str:
        """Return what to write instead of a name that is none: the nearest, else where names are found."""
        some = ", ".join(f'"{own}"' for own in self.names[:3])
        return self.near(name, 0.6) or (
            f" It has {len(self.names)}, such as {some}: write one of them, or its number from 0 to "
            f"{len(self.names) - 1}."
        )

    def find(self, name: str | int, where: str = "") -> Wanted:
        """Return what a name (or a number) means.

        Args:
            name: of a class, or its number.
            where: what an error's message begins with, such as "options.target: ".

        Raises:
            ConfigError: it means nothing; the message has the nearest name.
        """
        if isinstance(name, int):
            (index,) = self._number(name, where)
            return Wanted(self.names[index], (index,))
        key = split(name)
        if key in self._known:
            return Wanted(name, self._known[key])
        if key in self._lacking:
            raise ConfigError(where + self._no_class(name, self._lacking[key]))
        raise ConfigError(f'{where}The classifier has no class "{name}".{self._hint(name)}')

    def read(self, prompt: str) -> Wanted:
        """Return the class a prompt names: of all names in it the one with most words, the first of equals.

        Raises:
            PromptError: it names none; the message has the nearest name.
        """
        words = split(prompt)
        for length in range(min(self._longest, len(words)), 0, -1):
            for start in range(len(words) - length + 1):
                key = words[start : start + length]
                if key in self._known:
                    return Wanted(" ".join(key), self._known[key])
                if key in self._lacking:
                    raise PromptError(f'Prompt "{_short(prompt)}": {self._no_class(" ".join(key), self._lacking[key])}')
        what = f'The prompt "{_short(prompt)}" names no class' if words else "The prompt is empty: it names no class"
        unknown = list(dict.fromkeys(word for word in words if len(word) > 3))[:20]
        near = next((hint for word in unknown if (hint := self.near(word))), "")
        raise PromptError(
            f"{what} of the classifier.{near} Name one in the prompt or in its metadata, set options.target for all "
            "of them, add the word to options.synonyms, or leave such prompts out with options.unnamed: ignore."
        )

    def near(self, name: str, cutoff: float = 0.8) -> str:
        """Return ` Did you mean "x"?` for the nearest name, or an empty string."""
        known = (" ".join(key) for key in self._singular)
        nearest = get_close_matches(" ".join(split(name)), list(known), n=1, cutoff=cutoff)
        return f' Did you mean "{nearest[0]}"?' if nearest else ""

    def _no_class(self, name: str, reason: str) -> str:
        return f'ImageNet has no class for "{name}" ({reason}). Choose another, or say in options.synonyms what counts.'


def _many(known: Iterable[Key]) -> dict[Key, Key]:
    """Return plural -> singular for every name."""
    return {(*key[:-1], plural): key for key in known for plural in sorted(plurals(key[-1]))}


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


@cache
def imagenet_words() -> Words:
    """Return the table of common animals for ImageNet's 1000 classes."""
    table = json.loads(files("alignprop_classifier").joinpath("data/imagenet_words.json").read_text(encoding="utf-8"))
    return Words(table["groups"], table["lacking"])
