"""What a sample asks for: which objects and how many, read from a prompt. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from alignprop_core.errors import ConfigError, did_you_mean
from alignprop_counting.numerals import MOST, Amount, Doubt, amount_before, amounts, tokens_of
from alignprop_counting.words import ARTICLES, DENIALS, GROUPS, NEGATIONS, PAIRED, STOPS, plurals

_NO_NOUNS = STOPS | ARTICLES | DENIALS | NEGATIONS | frozenset(GROUPS) | {"for", "any", "some", "all", "its"}


@dataclass(frozen=True)
class Wish:
    """One thing asked for: a class by its index, and how many; None leaves the number open.

    `doubt` says why a prompt that does speak of a number was not read; the number is None then.
    """

    kind: int
    number: int | None
    doubt: Doubt | None = None


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
            words = " ".join(tokens_of(name))
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
        words = tuple(tokens_of(name))
        found = self._singular.get(words, self._plural.get(words))
        if found is None:
            raise ConfigError(
                f'{where}: the detector knows no class "{name}".{self.hint(name)} Write one of its class names.'
            )
        return found

    def hint(self, name: str) -> str:
        """Suggest the nearest class for a name, or list some."""
        return did_you_mean(name.lower(), self._kinds) or self._some()

    def hint_for(self, prompt: str) -> str:
        """Suggest the class that a prompt's words come nearest to, or list some.

        The words after a number come first: there the noun is. Number words and the like are left out ("three" is near
        to "sheep"), and the likeness asked for is higher than for a name, because most words are no misspelt class.
        """
        tokens = tokens_of(prompt)
        last = max(amounts(tokens), default=-1)
        forms = {" ".join(words): kind for found in (self._plural, self._singular) for words, kind in found.items()}
        for word in (*tokens[last + 1 :], *tokens[: last + 1]):
            if len(word) < 3 or word in _NO_NOUNS or amounts([word]):
                continue
            nearest = get_close_matches(word, forms, n=1, cutoff=0.75)
            if nearest:
                return f' Did you mean "{self.names[forms[nearest[0]]]}"?'
        return self._some()

    def _some(self) -> str:
        known = list(self._kinds)
        return f" It knows {len(known)}: {', '.join(known[:10])}{' and so on' if len(known) > 10 else ''}."

    def read(self, prompt: str) -> tuple[Wish, ...]:
        """Read the wishes of a prompt in the order of their first mention; several mentions of a class add up.

        `three foxes`, `3 dogs`, `a cat and two birds`, `no dogs`, `a dog without a cat`. A mention without a number
        leaves it open (None), unless another mention of the class has one. What a guess could get wrong ("2.5 dogs",
        "one or two cats", "not a dog") is a doubt.
        """
        tokens = tokens_of(prompt)
        known = amounts(tokens)
        wishes: dict[int, Wish] = {}
        at = start = 0
        negated = False
        while at < len(tokens):
            kind, plural, length = self._match(tokens, at)
            if not length:
                at += 1
                continue
            paired = self.names[kind].lower().split()[-1] in PAIRED
            found = amount_before(tokens, known, start, at, plural, paired)
            found = _joined(tokens, start, at, found, negated)
            negated = found.number == 0
            wishes[kind] = _added(wishes.get(kind), Wish(kind, found.number, found.doubt))
            at += length
            start = at
        return tuple(wishes.values())

    def only_number(self, prompt: str) -> Amount:
        """Return the one number the prompt holds (articles are none); an open one if it holds none or several."""
        tokens = tokens_of(prompt)
        known = amounts(tokens)
        if len(known) != 1:
            return Amount(None)
        (last,) = known
        group = last + 1 < len(tokens) and tokens[last + 1] in GROUPS
        return amount_before(tokens, known, 0, last + 2 if group else last + 1, True)

    def _match(self, tokens: list[str], at: int) -> tuple[int, bool, int]:
        """Return the class named at a place, whether in the plural alone, and by how many words (0: none)."""
        for length in range(min(self._longest, len(tokens) - at), 0, -1):
            words = tuple(tokens[at : at + length])
            if words in self._singular:
                return self._singular[words], False, length
            if words in self._plural:
                return self._plural[words], True, length
        return -1, False, 0


def _joined(tokens: Sequence[str], start: int, at: int, found: Amount, negated: bool) -> Amount:
    """Look at what joins a noun to the one before: "without cats or dogs", "one cat or two cats"."""
    if found.doubt is not None:
        # "neither ... nor" denies; after "no cats" a "nor" goes on with it.
        if not (negated and found.doubt.words.startswith("nor ")):
            return found
        return Amount(0)
    open_ = found.number is None
    join = tokens[at - 1] if open_ and at > start else tokens[found.first - 1] if found.first > start else ""
    if negated and (join in ("or", "nor") or (join == "and" and open_)):
        none = open_ or found.number == 0 or tokens[found.first] in ARTICLES
        return Amount(0) if none else _either(tokens, found, at)
    return _either(tokens, found, at) if join == "or" and start and not open_ else found


def _either(tokens: Sequence[str], found: Amount, at: int) -> Amount:
    words = " ".join(tokens[found.first - 1 : at + 1])
    return Amount(None, Doubt(words, "which of the two is meant is not clear"), found.first)


def _added(before: Wish | None, wish: Wish) -> Wish:
    """Add a mention of a class to those before it."""
    if before is None or before.doubt is not None:
        return wish if before is None else before
    if wish.doubt is not None:
        return wish
    if before.number is None or wish.number is None:
        return Wish(wish.kind, before.number if wish.number is None else wish.number)
    total = before.number + wish.number
    if total > MOST:
        doubt = Doubt(f"{before.number} and {wish.number}", f"{MOST} is the most that can be asked for")
        return Wish(wish.kind, None, doubt)
    return Wish(wish.kind, total)
