"""Map words to a classifier's classes: class names, plurals, words that mean several classes. Imports no torch.

ImageNet's classes are narrow ("kit fox", "tabby cat"), prompts are not ("three foxes"). A word can therefore map to
several classes, whose probabilities are summed. `data/imagenet_words.json` contains these words for common animals, and
the animals that have no ImageNet class.
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

Key = tuple[str, ...]  # the words of a name, lower case

_IRREGULAR = {
    "mouse": "mice", "louse": "lice", "goose": "geese", "mongoose": "mongooses", "ox": "oxen", "sheep": "sheep",
    "foot": "feet", "tooth": "teeth", "child": "children", "person": "people", "man": "men", "woman": "women",
    "wolf": "wolves", "calf": "calves", "leaf": "leaves", "loaf": "loaves", "knife": "knives", "shelf": "shelves",
    "scarf": "scarves", "wife": "wives", "deer": "deer",
}  # fmt: skip


class TargetClass(NamedTuple):
    """A class, or several classes that count as one.

    Attributes:
        name: name used in messages.
        indices: indices of the classes, from 0.
    """

    name: str
    indices: tuple[int, ...]


class Words(NamedTuple):
    """A table of common words.

    Attributes:
        groups: word -> the classes that it means; "A .. B" means all classes from A to B.
        missing: word without a class -> the reason, for messages.
    """

    groups: Mapping[str, Sequence[str | int]]
    missing: Mapping[str, str]


def plurals(word: str) -> set[str]:
    """Return the plural forms of an English noun: `fox` -> `foxes`; some have two (`fish`, `fishes`)."""
    if word in _IRREGULAR:
        return {_IRREGULAR[word]}
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return {word + "es"} | ({word} if word.endswith("fish") else set())
    if re.search(r"[^aeiou]y$", word):
        return {word[:-1] + "ies"}
    return {word + "s"} | ({word + "es"} if word.endswith("o") else set())


def split(text: str) -> Key:
    """Return the words of a text in lower case, without punctuation: `Shih-Tzu` -> `("shih", "tzu")`."""
    return tuple(re.findall(r"[^\W_]+", text.lower().replace("'", "")))


class ClassNames:
    """The classes of a network, and every word that maps to one or more of them.

    Args:
        names: a name for each class, in the network's order; commas separate synonyms. A name shared by several
            classes means any of them.
        words: words that mean several classes or none; they take precedence over `names`.
        synonyms: the user's own words; they take precedence over `words`.

    Raises:
        ConfigError: a synonym is empty, or refers to an unknown class.

    Attributes:
        names: the first name of each class.
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
        self._known = self._singular = known  # set early: `_members` suggests names from it
        table = words or Words({}, {})
        missing = {split(word): reason for word, reason in table.missing.items()}
        for key in missing:
            known.pop(key, None)
        for word, members in table.groups.items():
            known[split(word)] = self._members(members, word)
        for word, own in (synonyms or {}).items():
            key = split(word)
            if not key:
                raise ConfigError(
                    f'options.synonyms: "{word}" contains no letters or digits. Use a word from the prompts.'
                )
            missing.pop(key, None)
            known[key] = self._members([own] if isinstance(own, (str, int)) else own, word)
        self._known = {plural: known[key] for plural, key in _plural_keys(known).items()} | known
        missing = {plural: missing[key] for plural, key in _plural_keys(missing).items()} | missing
        self._missing = {key: reason for key, reason in missing.items() if key not in self._known}
        self._longest = max((len(key) for key in (*self._known, *self._missing)), default=0)

    def _members(self, members: Iterable[str | int], word: str) -> tuple[int, ...]:
        """Return the class indices of names, indices and ranges "A .. B"; `word` is for messages."""
        found: list[int] = []
        for member in members:
            if isinstance(member, int):
                found += self._check_index(member, f"options.synonyms.{word}: ")
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
            raise ConfigError(f"options.synonyms.{word} lists no class. List at least one.")
        return tuple(dict.fromkeys(found))

    def _check_index(self, index: int, where: str) -> tuple[int]:
        if not 0 <= index < len(self.names):
            raise ConfigError(
                f"{where}There is no class {index}: the classifier's classes are numbered 0 to {len(self.names) - 1}. "
                "Use one of these indices, or the name of a class."
            )
        return (index,)

    def _hint(self, name: str) -> str:
        """Return a suggestion for an unknown name: the nearest known name, otherwise examples."""
        examples = ", ".join(f'"{own}"' for own in self.names[:3])
        return self._did_you_mean(name, 0.6) or (
            f" It has {len(self.names)} classes, such as {examples}: use one of their names, or an index from 0 to "
            f"{len(self.names) - 1}."
        )

    def find(self, name: str | int, where: str = "") -> TargetClass:
        """Return the class, or classes, of a name or index.

        Args:
            name: name of a class, a word for several classes, or the index of a class.
            where: prefix of error messages, such as "options.target: ".

        Raises:
            ConfigError: there is no such class; the message suggests the nearest name.
        """
        if isinstance(name, int):
            (index,) = self._check_index(name, where)
            return TargetClass(self.names[index], (index,))
        key = split(name)
        if key in self._known:
            return TargetClass(name, self._known[key])
        if key in self._missing:
            raise ConfigError(where + self._no_class(name, self._missing[key]))
        raise ConfigError(f'{where}The classifier has no class "{name}".{self._hint(name)}')

    def find_in_prompt(self, prompt: str) -> TargetClass:
        """Return the class named in a prompt: the name with the most words, the first of several.

        Raises:
            PromptError: the prompt names no class; the message suggests the nearest name.
        """
        words = split(prompt)
        for length in range(min(self._longest, len(words)), 0, -1):
            for start in range(len(words) - length + 1):
                key = words[start : start + length]
                if key in self._known:
                    return TargetClass(" ".join(key), self._known[key])
                if key in self._missing:
                    raise PromptError(f'Prompt "{_short(prompt)}": {self._no_class(" ".join(key), self._missing[key])}')
        what = f'The prompt "{_short(prompt)}" names no class' if words else "The prompt is empty: it names no class"
        unknown = list(dict.fromkeys(word for word in words if len(word) > 3))[:20]
        near = next((hint for word in unknown if (hint := self._did_you_mean(word))), "")
        raise PromptError(
            f"{what} of the classifier.{near} Name a class in the prompt or its metadata, set options.target for all "
            "prompts, add the word to options.synonyms, or skip such prompts with options.unnamed: ignore."
        )

    def _did_you_mean(self, name: str, cutoff: float = 0.8) -> str:
        """Return ` Did you mean "x"?` for the nearest class name, or an empty string."""
        known = (" ".join(key) for key in self._singular)
        nearest = get_close_matches(" ".join(split(name)), list(known), n=1, cutoff=cutoff)
        return f' Did you mean "{nearest[0]}"?' if nearest else ""

    def _no_class(self, name: str, reason: str) -> str:
        return (
            f'ImageNet has no class for "{name}" ({reason}). Choose another class, or map the word to classes in '
            "options.synonyms."
        )


def _plural_keys(keys: Iterable[Key]) -> dict[Key, Key]:
    """Return plural -> singular for every name."""
    return {(*key[:-1], plural): key for key in keys for plural in sorted(plurals(key[-1]))}


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


@cache
def imagenet_words() -> Words:
    """Return the table of common animals for ImageNet's 1000 classes."""
    table = json.loads(files("alignprop_classifier").joinpath("data/imagenet_words.json").read_text(encoding="utf-8"))
    return Words(table["groups"], table["missing"])
