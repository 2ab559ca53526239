"""What single words of a prompt are: numbers, quantities, marks, ends of a noun phrase. Imports no torch."""

from __future__ import annotations

import re

from alignprop_counting import lexicon

MAX_COUNT = 1000
"""The largest count that can be requested, as in the option `number`."""

_NUMBER = re.compile(r"[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+")
_NOT_A_COUNT = re.compile(r"[-\u2212.]*[0-9][0-9.,/'_-]*|[0-9]+(?:st|nd|rd|th|x)|x[0-9]+")  # 2.5  -3  2-4  1st  3x


def read_number(word: str) -> int | None:
    """Read a lower-case number in digits ("1,000") or a word up to "twenty"; None for all else, articles included."""
    if word.isascii() and _NUMBER.fullmatch(word):
        return int(word.replace(",", "")) if len(word) < 20 else MAX_COUNT + 1
    return lexicon.TO_TWENTY.index(word) if word in lexicon.TO_TWENTY else None


def is_numeral(word: str) -> bool:
    """Whether a lower-case word is a number in any notation, also one that is not read ("2.5", "twenty-one")."""
    if read_number(word) is not None or _NOT_A_COUNT.fullmatch(word) or (word.isnumeric() and not word.isascii()):
        return True
    first, dash, last = word.partition("-")  # "twenty-one", "two-to-four"
    ends = (first, last.rpartition("-")[2])
    return dash != "" and all(end in lexicon.QUANTITIES or (end and is_numeral(end)) for end in ends)


def is_quantity(word: str) -> bool:
    """Whether a word gives a number or says what is counted: "three", "dozen", "year"."""
    return word in lexicon.QUANTITIES | lexicon.UNITS or is_numeral(word)


def is_mark(word: str) -> bool:
    """Whether a word is a punctuation mark."""
    return word != "" and not word[0].isalnum() and not is_numeral(word)


def is_denial(word: str) -> bool:
    """Whether a word denies what follows: "not", "isn't"."""
    return word in lexicon.DENIALS or word.endswith("n't")


def ends_phrase(word: str) -> bool:
    """Whether a word (or the end of the prompt, "") cannot be part of a noun phrase as an adjective or a noun."""
    known = word in lexicon.STOPS | lexicon.ARTICLES | lexicon.NEGATIONS
    return known or not word or is_mark(word) or is_quantity(word) or is_denial(word)
