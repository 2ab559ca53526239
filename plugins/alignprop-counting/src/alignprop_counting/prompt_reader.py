"""Reads from a prompt which classes an image must contain, and how many of each. Imports no torch.

A request is `NUMBER [adjectives] NOUN`. The number is in digits, a word up to twenty, `a`, `an`, `another`, `a pair
of`, `no` or `without`. Where other words may change the number or the noun, the request has a problem and the rewards
refuse the prompt: a refusal costs a minute, a wrong count a training run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from alignprop_counting.vocabulary import TOKEN, Match, Vocabulary, looks_plural, split

MAX_COUNT = 1000
"""The largest count that can be requested, as in the option `number`."""

_NUMBER = re.compile(r"[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+")
_NOT_A_COUNT = re.compile(r"[-\u2212.]*[0-9][0-9.,/'_-]*|[0-9]+(?:st|nd|rd|th|x)|x[0-9]+")  # 2.5  -3  2-4  1st  3x


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TO_TWENTY = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
_ARTICLES = _words("a an another")
_NEGATIONS = _words("no without")
_DENIALS = _words("not never neither cannot none except instead excluding")
_DEFINITE = _words("the this that these those his her its their my your our")
_PER_ITEM = _words("each every per apiece")
_QUANTITIES = _PER_ITEM | _words(
    "thirty forty fifty sixty seventy eighty ninety hundred thousand million billion dozen couple trio pair half "
    "quarter first second third fourth fifth sixth seventh eighth ninth tenth several few many some most all both more "
    "less fewer lot"
)
# What a number may count instead of the noun: "two year old dogs".
_UNITS = _words("year month week day inch foot feet meter metre door legged headed wheeled")
# Words that end a noun phrase. After those in `_LEADS` a number is exact; after others it may not be ("over ten dogs").
_LEADS = _DEFINITE | _words(
    "and of with in on at near by beside behind between from into while for is are was were has have who which against "
    "across along through inside outside among"
)
_STOPS = _LEADS | _words("over under above below around to or nor but as like than")
_ARTICLE_HEDGES = _words("half than like as many almost nearly or nor")
_JOINS = _words("and or to of by x \u00d7 * - \u2013 \u2014 / ,")
# Lead-ins that a number may have beside these: "exactly two dogs", "a fox chases two dogs", but "minus two dogs".
_ALSO_LEADS = _words("only exactly just , . ; : ! ? ( ) \" ' - \u2013 \u2014")
_NO_LEADS = _words("including minus times perhaps")
# Other words after a noun that the noun does not describe.
_AFTER = _words(
    "asleep awake alone outdoors indoors there here together up down next wearing made sat stood lay ran slept ate "
    "held looking onto off after before during toward towards where when"
)
_NOUNS_IN_ING = _words("painting drawing building parking crossing clothing racing ceiling string spring")
_PAIRED = _words(
    "skis scissors glasses sunglasses goggles binoculars pliers tweezers tongs headphones trousers pants jeans shorts"
)

Problem = Literal["", "number", "object"]
"""What is not clear: the number alone, or whether the object itself is wanted."""


@dataclass(frozen=True)
class Request:
    """A class that an image must contain, and how many of it.

    Attributes:
        class_id: index of the class.
        count: how many; None if no clear number is given.
        words: the words of the prompt, for messages.
        problem: what is not clear; empty if nothing is, or if there is just no number ("foxes").
    """

    class_id: int
    count: int | None
    words: str = field(default="", compare=False)
    problem: Problem = field(default="", compare=False)


@dataclass(frozen=True)
class _Mention:
    """A class name in a prompt with the words that belong to it, `words[first:last]`.

    `compound`: it may describe the next noun; `vague`: a plural without number or article, which may be any number.
    """

    first: int
    last: int
    count: int | None
    problem: Problem = ""
    compound: bool = False
    vague: bool = False


def read_number(word: str) -> int | None:
    """Read a lower-case number in digits ("1,000") or a word up to "twenty"; None for all else, articles included."""
    if word.isascii() and _NUMBER.fullmatch(word):
        return int(word.replace(",", "")) if len(word) < 20 else MAX_COUNT + 1
    return _TO_TWENTY.index(word) if word in _TO_TWENTY else None


def _is_numeral(word: str) -> bool:
    if read_number(word) is not None or _NOT_A_COUNT.fullmatch(word) or (word.isnumeric() and not word.isascii()):
        return True
    first, dash, last = word.partition("-")  # "twenty-one", "two-to-four"
    ends = (first, last.rpartition("-")[2])
    return dash != "" and all(end in _QUANTITIES or (end and _is_numeral(end)) for end in ends)


def _is_quantity(word: str) -> bool:
    return word in _QUANTITIES | _UNITS or _is_numeral(word)


def _is_mark(word: str) -> bool:
    return word != "" and not word[0].isalnum() and not _is_numeral(word)


def _is_denial(word: str) -> bool:
    return word in _DENIALS or word.endswith("n't")


def ends_phrase(word: str) -> bool:
    """Whether a word (or the end of the prompt, "") cannot be part of a noun phrase as an adjective or a noun."""
    known = word in _STOPS | _ARTICLES | _NEGATIONS
    return known or not word or _is_mark(word) or _is_quantity(word) or _is_denial(word)


def read_prompt(prompt: str, vocabulary: Vocabulary) -> tuple[Request, ...]:
    """Read the requests of a prompt in the order of their first mention.

    Mentions of one class add up ("a dog and another dog"). A class name before another noun describes that noun ("a
    bird bath with two birds" are two birds); it is a request with a problem only if the prompt has no other request.
    """
    words = split(prompt)
    spans = [token.span() for token in TOKEN.finditer(prompt)]
    found: dict[int, _Mention] = {}
    described: dict[int, _Mention] = {}
    excluded = False  # whether the noun before was excluded: "no cats"
    at = start = 0
    while at < len(words):
        match = vocabulary.match(words, at)
        end = at + (match.length if match else 1)
        if match is None or (match.singular and vocabulary.match(words, end)):
            at = end  # "an orange cow": the object is the next noun
            continue
        paired = vocabulary.names[match.class_id].lower().split()[-1] in _PAIRED
        mention = _read_mention(words, start, at, match, 1 if paired else 2, excluded)
        excluded = mention.count == 0
        if mention.compound and (mention.count or 0) < 2:
            described.setdefault(match.class_id, mention)
        else:
            before = found.get(match.class_id)
            marked = before is not None and any(map(_is_mark, words[before.last : at]))
            found[match.class_id] = mention if before is None else _combined(before, mention, marked)
        at = start = end
    return tuple(
        Request(
            class_id,
            None if mention.problem else mention.count,
            prompt[spans[mention.first][0] : spans[mention.last - 1][1]],
            mention.problem,
        )
        for class_id, mention in (found or described).items()
    )


def _combined(before: _Mention, mention: _Mention, marked: bool) -> _Mention:
    """Add a mention of a class to those before it; `marked` if a punctuation mark separates them."""
    if before.problem or mention.problem:
        return before if before.problem else mention
    counts = [one.count for one in (before, mention) if one.count is not None]
    # "two dogs, a black dog and a white dog" are two; "a dog among dogs" are many.
    unclear = counts and (before.vague or mention.vague or (marked and len(counts) > 1) or sum(counts) > MAX_COUNT)
    return replace(
        before,
        last=mention.last,
        count=sum(counts) if counts else None,
        problem="number" if unclear else "",
        vague=before.vague or mention.vague,
    )


def _read_mention(words: Sequence[str], start: int, at: int, match: Match, pair: int, excluded: bool) -> _Mention:
    """Read the number of the noun at `words[at]`.

    Args:
        words: the prompt.
        start: index after the noun before.
        at: index of the noun.
        match: its class.
        pair: number of objects in "a pair of" this noun.
        excluded: whether the noun before was excluded.
    """
    end = at + match.length
    after, second = [*words[end : end + 2], "", ""][:2]
    first = at
    while first > start and not ends_phrase(words[first - 1]):
        first -= 1
    adjectives, determiner = words[first:at], words[first - 1] if first > start else ""
    # The number, and where the phrase begins with it.
    count: int | None = None
    article = determiner in _ARTICLES
    definite = determiner in _DEFINITE
    own = numbered = False  # whether it has more than an article: a number or a negation; a number
    if determiner in _NEGATIONS or (article and words[first - 2] in _NEGATIONS and first - 2 >= start):
        first, count, own = first - (2 if article else 1), 0, True
    elif article:
        first, count = first - 1, 1 if match.singular else None  # "a forest foxes"
    elif list(words[max(start, first - 3) : first]) == ["a", "pair", "of"]:
        first, count, own, numbered = first - 3, pair, True, True
    elif determiner and _is_quantity(determiner):
        first, count, own, numbered = first - 1, read_number(determiner), True, True
    lead = list(words[start:first])
    while lead and lead[-1] in _DEFINITE:
        lead.pop()  # "two of the three dogs"
    before, last = ["", "", *lead][-2:]
    clause = lead[max((i for i, word in enumerate(lead, 1) if _is_mark(word) or word == "and"), default=0) :]
    many = (count or 0) > 1

    compound = _describes(after, second, match, many) or (many and not match.plural)
    object_unclear = (
        compound
        or any(map(_is_denial, words[start:at]))
        or not _NEGATIONS.isdisjoint(clause)  # "no two dogs", "no people near a dog"
        or (last in ("or", "nor") and not _is_quantity(before))
        or (after == "or" and not _is_quantity(second))
        or (excluded and not own and lead and {*lead} <= {"and", "or", "nor", ","})  # "no cats and dogs"
        or (article and last in _ARTICLE_HEDGES)
        or 0 in (read_number(before) if last in _JOINS else None, count if last == "or" else None)  # "zero or one dogs"
    )
    if count is not None and adjectives:
        # "three girls riding horses": the number may belong to another noun.
        verbs = any(looks_plural(word) or (i > 0 and word.endswith("ing")) for i, word in enumerate(adjectives))
        object_unclear |= verbs or len(adjectives) > 4 or (count == 1 and not match.singular)
    number_unclear = (
        (numbered and (count is None or count > MAX_COUNT))
        or (last in _JOINS and _is_quantity(before))  # "one or two", "two - four", "most of five"
        or (last == "of" and (looks_plural(before) or before == "out"))  # "rows of three cars", "one out of ten"
        or (numbered and not _is_lead(last, before))  # "over ten dogs"
        or (count and (after == "or" or not _PER_ITEM.isdisjoint(words)))
        or (count and (_is_numeral(after) or (after in tuple("x\u00d7*(:#") and _is_numeral(second))))  # "a dog x3"
    )
    problem: Problem = "object" if object_unclear else "number" if number_unclear else ""
    if problem or count is None:  # the words around it are quoted as well
        if problem:
            end = min(end + (2 if not compound and (after == "or" or _is_numeral(second)) else 1), len(words))
        first = max(start, first - 3)
        while first < at and (_is_mark(words[first]) or words[first] == "and"):
            first += 1
    return _Mention(first, end, count, problem, compound, vague=count is None and not definite and not match.singular)


def _is_lead(word: str, before: str) -> bool:
    """Whether a number after this word is exact."""
    verb = (looks_plural(word) or word.endswith(("ing", "'s"))) and word not in _NO_LEADS
    return not word or word in _LEADS | _ALSO_LEADS or verb or (before, word) == ("next", "to")


def _describes(after: str, second: str, match: Match, many: bool) -> bool:
    """Whether a noun may describe the word after it: "car park", but not "car in", "car parked in", "car drives"."""
    if after == "'":
        return True  # "two dogs' bowls"
    if after in _AFTER or ends_phrase(after):
        return False
    if not match.singular or (many and match.plural):
        return looks_plural(after)  # "two fish tanks", but "two dogs sleep"
    participle = re.fullmatch(r"\w{2,}([^e]ed|ing)", after) is not None and after not in _NOUNS_IN_ING
    return not ((participle or looks_plural(after)) and (second in _AFTER or ends_phrase(second)))
