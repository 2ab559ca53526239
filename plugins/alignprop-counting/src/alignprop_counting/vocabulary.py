"""A detector's class names, found in text in singular and plural. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from alignprop_core.errors import ConfigError, did_you_mean

TOKEN = re.compile(
    r"(?<!\w)[-\u2212]?[0-9]+(?:[.,/'\u2019_][0-9]+)+(?!\w)"  # 1,000  2.5  1/2
    r"|(?<!\S)[-\u2212.]+[0-9][0-9.]*"  # -3  .5
    r"|[^\W_]+(?:[-'\u2019][^\W_]+)*|\S"
)
_IRREGULAR = {
    "person": ("people", "persons"),
    "man": ("men",),
    "woman": ("women",),
    "child": ("children",),
    "mouse": ("mice", "mouses"),
    "goose": ("geese",),
    "foot": ("feet",),
    "tooth": ("teeth",),
    "ox": ("oxen",),
    "sheep": ("sheep",),
    "deer": ("deer",),
    "fish": ("fish", "fishes"),
    "aircraft": ("aircraft",),
    "octopus": ("octopuses", "octopi"),
    "hippopotamus": ("hippopotamuses", "hippopotami"),
    "cactus": ("cactuses", "cacti"),
}
_SIMILAR_WORDS = {"bandana", "bandanas"}  # words of their own, one letter from a class name
_IRREGULAR_PLURALS = {form for name, forms in _IRREGULAR.items() for form in forms if form != name}


def split(text: str) -> list[str]:
    """Split a text into lower-case words, numbers and single marks: the matches of `TOKEN`."""
    return [token.lower().replace("\u2019", "'") for token in TOKEN.findall(text)]


def plurals(noun: str) -> frozenset[str]:
    """Return the plural forms of a lower-case noun; of several words the last one changes: `traffic lights`."""
    head, _, last = noun.rpartition(" ")
    before = f"{head} " if head else ""
    forms = set(_IRREGULAR.get(last, ()))
    if not forms:
        if last.endswith(("s", "x", "z", "ch", "sh")):
            forms = {last + "es"}
            if last.endswith("s"):
                forms.add(last)  # scissors, skis
        elif last.endswith("y") and last[-2:-1] not in set("aeiou"):
            forms = {last[:-1] + "ies"}
        elif last.endswith(("fe", "f")) and not last.endswith(("ffe", "ff")):
            forms = {last.removesuffix("e")[:-1] + "ves", last + "s"}
        elif last.endswith("o"):
            forms = {last + "s", last + "es"}
        else:
            forms = {last + "s"}
    return frozenset(before + form for form in forms)


def looks_plural(word: str) -> bool:
    """Whether a lower-case word may be a plural noun or a verb such as "chases"."""
    regular = len(word) > 2 and word.endswith("s") and not word.endswith(("ss", "ous", "'s"))
    return word in _IRREGULAR_PLURALS or (regular and word not in ("sports", "christmas"))


@dataclass(frozen=True)
class Match:
    """A class name in a text: index, length in words, and whether the words are a singular, a plural or both."""

    class_id: int
    length: int
    singular: bool
    plural: bool


class Vocabulary:
    """A detector's class names.

    Args:
        names: class names in order. Names without letters, and `N/A`, are placeholders and never match.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._singular: dict[str, int] = {}
        self._plural: dict[str, int] = {}
        for class_id, name in enumerate(self.names):
            noun = " ".join(split(name))
            if name == "N/A" or not any(character.isalpha() for character in noun):
                continue
            self._singular.setdefault(noun, class_id)
            for form in plurals(noun):
                self._plural.setdefault(form, class_id)
        self._misspelled: dict[str, int | None] = {}
        self._longest = max((len(noun.split()) for noun in (*self._singular, *self._plural)), default=0)

    def match(self, words: Sequence[str], at: int) -> Match | None:
        """Return the longest class name that begins at `words[at]`, or None; words are in lower case."""
        for length in range(min(self._longest, len(words) - at), 0, -1):
            noun = " ".join(words[at : at + length])
            class_id = self._singular.get(noun, self._plural.get(noun))
            if class_id is not None:
                return Match(class_id, length, noun in self._singular, self._plural.get(noun) == class_id)
        return None

    def misspelled(self, word: str) -> int | None:
        """Return the class that a lower-case word is most likely a misspelling of; None if it may be another word."""
        if word not in self._misspelled:
            forms = {**self._plural, **self._singular}
            near = get_close_matches(word, forms, n=1, cutoff=0.92) if len(word) > 5 and word.isalpha() else []
            longer = any(word.startswith(name) for name in self._singular)  # "skateboarder"
            known = bool(near) and near[0][0] == word[0] and not longer and word not in _SIMILAR_WORDS
            self._misspelled[word] = forms[near[0]] if known else None
        return self._misspelled[word]

    def class_id(self, name: str, where: str) -> int:
        """Return the index of a class by its name, singular or plural, in any case.

        Raises:
            ConfigError: the detector has no such class; the message begins with `where`.
        """
        words = split(name)
        found = self.match(words, 0)
        if found is None or found.length != len(words):
            hint = did_you_mean(name.lower(), self._singular) or self._some()
            raise ConfigError(f'{where}: the detector has no class "{name}".{hint} Use one of its class names.')
        return found.class_id

    def hint(self, words: Sequence[str]) -> str:
        """Suggest the classes that some of the words may be misspellings of, or list a few classes."""
        forms = {**self._plural, **self._singular}
        # A higher similarity than for a single name, because most words of a prompt are not a misspelled class.
        nearest = [get_close_matches(word, forms, n=1, cutoff=0.75) for word in words if len(word) > 2]
        found = dict.fromkeys(self.names[forms[near[0]]] for near in nearest if near)
        return f" Did you mean {' or '.join(map(_quoted, found))}?" if found else self._some()

    def _some(self) -> str:
        known = list(self._singular)
        return f" It has {len(known)}: {', '.join(known[:10])}{', ...' if len(known) > 10 else ''}."


def _quoted(name: str) -> str:
    return f'"{name}"'
