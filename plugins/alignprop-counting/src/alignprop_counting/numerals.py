"""The numbers of a prompt: how many a noun has before it, or why that cannot be told. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from alignprop_counting.words import (
    ARTICLES,
    DENIALS,
    GROUPS,
    HEDGES,
    NEGATIONS,
    PARTS,
    SCALES,
    STOPS,
    number_of,
)

MOST = 1000
"""The largest number a wish can have, as in the option `number`."""

TOKEN = re.compile(
    r"(?<![a-z0-9])[-\u2212]?[0-9]+(?:[.,/'_][0-9]+)+(?![a-z0-9])"  # 1,000  2.5  -2.5  1/2
    r"|(?<!\S)[-\u2212](?:[0-9]+|\.[0-9]+)(?![a-z0-9])|(?<!\S)\.[0-9]+(?![a-z0-9])"  # -3  .5
    r"|[a-z0-9]+(?:[-'][a-z0-9]+)*|[^\sa-z0-9]"
)
_THOUSANDS = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+")
_JOINS = frozenset({"or", "to", "and", "of", "out of", "of the", "out of the", "-", "\u2013", "\u2014", "/"})
_REACH = 8
"""Most words between a number and its noun."""

_WHOLE = "a count is a whole number"
_NEGATIVE = "a count cannot be negative"
_SEVERAL = "which number is meant is not clear"
_ROUGH = "a rough number cannot be checked"
_IN_DIGITS = f"numbers from a hundred on are read in digits, up to {MOST}"
_TOO_MANY = f"{MOST} is the most that can be asked for"
_DENIED = 'only "no" and "without" before a noun are read as none of it'


@dataclass(frozen=True)
class Doubt:
    """Words that are not read, because a guess could be wrong.

    Attributes:
        words: the words of the prompt.
        reason: what is the matter with them.
        wanted: whether it is in doubt that the object is wanted at all, not only how many.
    """

    words: str
    reason: str
    wanted: bool = False


@dataclass(frozen=True)
class Amount:
    """A number or a doubt, and where it begins; neither leaves the number open."""

    number: int | None
    doubt: Doubt | None = None
    first: int = 0


def tokens_of(text: str) -> list[str]:
    """Split a text into lower-case words, numbers and single marks."""
    return TOKEN.findall(text.lower())


def amounts(tokens: Sequence[str]) -> dict[int, Amount]:
    """Return every number in a text, by the index of its last word.

    Numbers side by side, or joined by "or", "to" or a dash, are one amount: "twenty one" is a number, "one or two" and
    "ten thousand" are a doubt.
    """
    found: dict[int, Amount] = {}
    at = 0
    while at < len(tokens):
        if _numeral(tokens[at]) is None:
            at += 1
            continue
        first = last = at
        while (step := _continued(tokens, last + 1)) is not None:
            last = step
        found[last] = _amount(tokens, first, last)
        at = last + 1
    return found


def amount_before(
    tokens: Sequence[str], known: dict[int, Amount], start: int, at: int, plural: bool, paired: bool = False
) -> Amount:
    """Find the number that belongs to the noun at `at`, looking back no further than `start`.

    Args:
        tokens: the text.
        known: its `amounts`.
        start: index after the noun before.
        at: index of the noun.
        plural: whether the noun has a plural's form.
        paired: whether a pair of it is one object (skis).
    """
    for i in range(at - 1, max(start, at - _REACH) - 1, -1):
        word = tokens[i]
        before = tokens[i - 1] if i > start else ""
        if word in NEGATIONS or (word in ARTICLES and before in NEGATIONS):
            first = i if word in NEGATIONS else i - 1
            return _denied(tokens, start, first, at) or Amount(0, None, first)
        if _denies(word):
            return _denied(tokens, start, i + 1, at) or Amount(None)
        if word in ARTICLES:
            # "a forest, foxes": a plural has no article of its own.
            return _denied(tokens, start, i, at) or Amount(None if plural else 1, None, i)
        if word in GROUPS and (i == at - 1 or tokens[i + 1] == "of" or word == "dozen"):
            return _group(tokens, known, start, i, at, 1 if paired and word == "pair" else GROUPS[word])
        if word == "half" and i - 2 >= start and tokens[i - 2] == "and" and before in ARTICLES:
            return Amount(None, Doubt(" ".join(tokens[i - 2 : i + 1]), _WHOLE), i - 2)
        if i in known:
            amount = known[i]
            # "no more than two cats" is in doubt by itself, and "no" means nothing of its own there.
            return amount if amount.doubt else _denied(tokens, start, amount.first, at) or amount
        if word == "of" and before in GROUPS:
            continue
        # An enumeration's comma ends a noun phrase; "three small, red foxes" shows by its plural that it goes on.
        if word in STOPS or (not word[0].isalnum() and word not in "'\"" and not (word == "," and plural)):
            return (_denied(tokens, start, i, at) if word in STOPS else None) or Amount(None)
    return Amount(None)


def _group(tokens: Sequence[str], known: dict[int, Amount], start: int, i: int, at: int, size: int) -> Amount:
    """Return the number of "two dozen", "a pair of", "half a dozen"; the group's word, worth `size`, is at `i`."""
    first = i
    if i > start and i - 1 in known:
        times = known[i - 1]
        first = times.first
        if times.doubt is not None or times.number is None:
            return times
        size *= times.number
    elif i > start and tokens[i - 1] in ("several", "few", "many", "some"):
        return Amount(None, Doubt(f"{tokens[i - 1]} {tokens[i]}", _SEVERAL), i - 1)
    else:
        if i > start and tokens[i - 1] in ARTICLES:
            first = i - 1
        if first > start and tokens[first - 1] == "half":
            first, size = first - 1, size // 2 if size % 2 == 0 else size
    if size > MOST:
        return Amount(None, Doubt(" ".join(tokens[first : i + 1]), _TOO_MANY), first)
    if first > start and tokens[first - 1] in HEDGES:
        return Amount(None, Doubt(" ".join(tokens[first - 1 : i + 1]), _ROUGH), first - 1)
    return _denied(tokens, start, first, at) or Amount(size, None, first)


def _denies(word: str) -> bool:
    return word in DENIALS or word.endswith("n't")


def _denied(tokens: Sequence[str], start: int, first: int, at: int) -> Amount | None:
    """Return the doubt of a noun phrase whose number begins at `first` and that follows "not" or the like."""
    if first <= start:
        return None
    before = tokens[first - 1]
    # "no two cats": the number has been read, so that "no" is not "none".
    numbered = tokens[first] not in NEGATIONS | ARTICLES | STOPS
    if _denies(before) or (before in NEGATIONS and numbered):
        words = " ".join(tokens[first - 1 : at + 1])
        return Amount(None, Doubt(words, _DENIED, wanted=True), first - 1)
    return None


def _continued(tokens: Sequence[str], at: int) -> int | None:
    """Return where the next numeral of an amount is, if it goes on at `at`."""
    for i in range(at, min(at + 4, len(tokens))):
        if _numeral(tokens[i]) is not None and (i == at or " ".join(tokens[at:i]) in _JOINS):
            return i
    return None


def _amount(tokens: Sequence[str], first: int, last: int) -> Amount:
    parts = list(tokens[first : last + 1])
    words = " ".join(parts)
    numerals = [found for part in parts if (found := _numeral(part)) is not None]
    problem = next((found for found in numerals if isinstance(found, str)), None)
    before = list(tokens[max(first - 2, 0) : first])
    # "zero or one": not even whether one is wanted can be told.
    perhaps = len(numerals) > 1 and 0 in numerals
    if before[-1:] in (["minus"], ["negative"]):
        return Amount(None, Doubt(f"{before[-1]} {words}", _NEGATIVE), first - 1)
    if before[-1:] == ["than"] or before in (["at", "least"], ["at", "most"], ["up", "to"]):
        return Amount(None, Doubt(f"{' '.join(before)} {words}", _SEVERAL, perhaps), first - len(before))
    if before[-1:] and before[-1] in HEDGES:
        return Amount(None, Doubt(f"{before[-1]} {words}", _ROUGH, perhaps), first - 1)
    share = list(tokens[max(first - 3, 0) : first])
    share = share[1:] if share[-1:] == ["of"] and len(share) == 3 else share
    if share[1:] in (["of"], ["of", "the"]) and share[0] in PARTS:
        none = perhaps or share[0] == "none"
        return Amount(None, Doubt(f"{' '.join(share)} {words}", _SEVERAL, none), first - len(share))
    if problem is not None:
        return Amount(None, Doubt(words, problem, perhaps), first)
    number = number_of("-".join(parts)) if len(parts) == 2 else None  # "twenty one"
    if len(parts) == 1 and isinstance(numerals[0], int):
        number = numerals[0]
    if number is None:
        return Amount(None, Doubt(words, _SEVERAL, perhaps), first)
    return Amount(number, None, first)


def _numeral(word: str) -> int | str | None:
    """Read a word that stands for a number: the number, or why it is none that can be wished for; None if it is none.

    Articles and groups ("dozen") are no numerals.
    """
    number = number_of(word)
    if number is None and _THOUSANDS.fullmatch(word):
        number = int(word.replace(",", "")) if len(word) <= 20 else MOST + 1
    if number is not None:
        return number if number <= MOST else _TOO_MANY
    if word.isascii() and word.isdigit():
        return _TOO_MANY
    if word in SCALES:
        return _IN_DIGITS
    if word[0] in "-\u2212" and len(word) > 1:
        return _NEGATIVE
    if not word.isascii():
        return _WHOLE if word.isnumeric() else None
    if re.fullmatch(r"[0-9.,/'_]*[0-9]", word):
        return _WHOLE
    pieces = word.split("-")
    if len(pieces) > 1 and all(number_of(p) is not None or p in SCALES or p in _JOINS for p in pieces):
        return _IN_DIGITS if SCALES & set(pieces) else _SEVERAL  # "2-4", "two-to-four", "two-hundred"
    return None
