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

from alignprop_counting import lexicon
from alignprop_counting.phrases import MAX_COUNT, ends_phrase, is_denial, is_mark, is_numeral, is_quantity, read_number
from alignprop_counting.vocabulary import TOKEN, Match, Vocabulary, looks_plural, split

# Text in quotation marks, single ones included; an apostrophe follows a letter, an opening mark does not.
_QUOTED = re.compile(
    '["\u201c-\u201f\u00ab][^"\u201c-\u201f\u00bb]*["\u201c-\u201f\u00bb]'
    r"|(?<!\w)['\u2018]\w.*?['\u2019](?!\w)",
    re.DOTALL,
)
_WEIGHT = re.compile(r"[01]\.[0-9]*[1-9]")  # of a part of a prompt: "(two cats:1.2)"

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

    `compound`: it may describe the next noun; `described`: the next noun is known, and it does; `vague`: a plural
    without number or article, which may be any number.
    """

    first: int
    last: int
    count: int | None
    problem: Problem = ""
    compound: bool = False
    described: bool = False
    vague: bool = False


def read_prompt(prompt: str, vocabulary: Vocabulary) -> tuple[Request, ...]:
    """Read the requests of a prompt in the order of their first mention.

    Mentions of one class add up ("a dog and another dog"). A class name before another noun describes that noun ("a
    bird bath with two birds" are two birds); it is a request with a problem only if the prompt has no other request.
    """
    words = split(prompt)
    spans = [token.span() for token in TOKEN.finditer(prompt)]
    # 'a shirt that says "two dogs"', but not a prompt that is in quotation marks itself
    quoted = [part.span() for part in _QUOTED.finditer(prompt) if part[0] != prompt.strip()]
    found: dict[int, _Mention] = {}
    described: dict[int, _Mention] = {}
    misspelled: dict[int, _Mention] = {}
    excluded = False  # whether the noun before was excluded: "no cats"
    latest: int | None = None  # class of the noun before
    at = start = 0
    while at < len(words):
        match = vocabulary.match(words, at)
        end = at + (match.length if match else 1)
        if match is None or (match.singular and vocabulary.match(words, end)):
            if match is None and (unclear := _hyphenated(words[at], vocabulary)) is not None:
                found[unclear] = _Mention(at, end, None, "object")
            elif match is None and (unclear := vocabulary.misspelled(words[at])) is not None:
                misspelled[unclear] = _Mention(at, end, None, "object")
            elif latest in found and _is_number_alone(words, at, found[latest].count or 0):
                found[latest] = replace(found[latest], last=end, count=None, problem="number")
            at = end  # "an orange cow": the object is the next noun
            continue
        paired = vocabulary.names[match.class_id].lower().split()[-1] in lexicon.PAIRED
        mention = _read_mention(words, start, at, match, 1 if paired else 2, excluded)
        if any(begin < spans[at][0] < close for begin, close in quoted):
            mention = replace(mention, count=None, problem="object")
        excluded = mention.count == 0
        if mention.compound and latest in found and start < at and {*words[start:at]} <= lexicon.COORDINATIONS:
            # "a cat and mouse game": the noun before may describe the same noun.
            found[latest] = replace(found[latest], last=mention.last, count=None, problem="object")
        if mention.compound and mention.described:
            described.setdefault(match.class_id, mention)
        else:
            before = found.get(match.class_id)
            marked = before is not None and any(map(is_mark, words[before.last : at]))
            found[match.class_id] = mention if before is None else _combined(before, mention, marked)
        latest = match.class_id
        at = start = end
    return tuple(
        Request(
            class_id,
            None if mention.problem else mention.count,
            prompt[spans[mention.first][0] : spans[mention.last - 1][1]],
            mention.problem,
        )
        for class_id, mention in ({**misspelled, **found} if found else described).items()
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
    article = determiner in lexicon.ARTICLES
    definite = determiner in lexicon.DEFINITE
    own = numbered = False  # whether it has more than an article: a number or a negation; a number
    if determiner in lexicon.NEGATIONS or (article and words[first - 2] in lexicon.NEGATIONS and first - 2 >= start):
        first, count, own = first - (2 if article else 1), 0, True
    elif article:
        first, count = first - 1, 1 if match.singular else None  # "a forest foxes"
    elif list(words[max(start, first - 3) : first]) == ["a", "pair", "of"]:
        first, count, own, numbered = first - 3, pair, True, True
    elif determiner and is_quantity(determiner):
        first, count, own, numbered = first - 1, read_number(determiner), True, True
    lead = list(words[start:first])
    while lead and lead[-1] in lexicon.DEFINITE:
        lead.pop()  # "two of the three dogs"
    before, last = ["", "", *lead][-2:]
    clause = lead[max((i for i, word in enumerate(lead, 1) if is_mark(word) or word == "and"), default=0) :]
    many = (count or 0) > 1

    compound = _describes(after, second, match, many) or (many and not match.plural)
    object_unclear = (
        compound
        or any(map(is_denial, words[start:at]))
        or not lexicon.ABSENT.isdisjoint([*adjectives, *_until_mark(words[end : end + 3])])
        or not lexicon.NEGATIONS.isdisjoint(clause)  # "no two dogs", "no people near a dog"
        or not lexicon.TEXT.isdisjoint(clause)
        or (last in ("or", "nor") and not is_quantity(before))
        or (after == "or" and not is_quantity(second))
        or (excluded and not own and lead and {*lead} <= {"and", "or", "nor", ","})  # "no cats and dogs"
        or (article and last in lexicon.ARTICLE_HEDGES)
        or (last == "of" and before in lexicon.NOT_OF)
        or (last == "but" and before in lexicon.ALL_BUT)
        or 0
        in (
            read_number(before) if last in lexicon.JOINS else None,
            count if last == "or" else None,
        )  # "zero or one dogs"
    )
    if count is not None and adjectives:
        # "three girls riding horses": the number may belong to another noun.
        verbs = any(looks_plural(word) or (i > 0 and word.endswith("ing")) for i, word in enumerate(adjectives))
        verbs = verbs or not {"x", "\u00d7"}.isdisjoint(adjectives)  # "3 x dogs"
        object_unclear |= verbs or len(adjectives) > 4 or (count == 1 and not match.singular)
    weighted = after == ":" and _WEIGHT.fullmatch(second) and words[end + 2 : end + 3] == [")"]
    number_unclear = (
        (numbered and (count is None or count > MAX_COUNT))
        or (last in lexicon.JOINS and is_quantity(before))  # "one or two", "two - four", "most of five"
        or (
            last == "of" and (looks_plural(before) or before in lexicon.PARTS)
        )  # "rows of three cars", "one out of ten"
        or (count and _is_elliptic(words, start, first))  # "a black and a white dog"
        or (count and _is_hedged_after(words[end : end + 5], count == 1))
        or (numbered and not _is_lead(last, before))  # "over ten dogs"
        or (count and (after == "or" or not lexicon.PER_ITEM.isdisjoint(words)))
        or (count and is_numeral(after))
        or (count and after in tuple("x\u00d7*(:#") and is_numeral(second) and not weighted)  # "a dog x3"
    )
    problem: Problem = "object" if object_unclear else "number" if number_unclear else ""
    if problem or count is None:  # the words around it are quoted as well
        if problem:
            end = min(end + (2 if not compound and (after == "or" or is_numeral(second)) else 1), len(words))
        first = max(start, first - 3)
        while first < at and (is_mark(words[first]) or words[first] == "and"):
            first += 1
    # "a bird bath", but neither "two dog bowls" nor "no dog bowls"
    described = compound and count in (None, 1) and _head(words, at + match.length) in lexicon.HEADS
    return _Mention(
        first, end, count, problem, compound, described, vague=count is None and not definite and not match.singular
    )


def _is_lead(word: str, before: str) -> bool:
    """Whether a number after this word is exact."""
    verb = (looks_plural(word) or word.endswith(("ing", "'s"))) and word not in lexicon.NO_LEADS
    return not word or word in lexicon.LEADS | lexicon.ALSO_LEADS or verb or (before, word) == ("next", "to")


def _hyphenated(word: str, vocabulary: Vocabulary) -> int | None:
    """Return the class that is part of a word like "two-dog" or "car-free", which changes its number; or None."""
    first, *others = word.split("-")
    if not others or not (is_quantity(first) or others[-1] in ("free", "less")):
        return None
    matches = [vocabulary.match([part], 0) for part in (first, *others)]
    return next((match.class_id for match in matches if match is not None), None)


def _is_number_alone(words: Sequence[str], at: int, count: int) -> bool:
    """Whether a word stands for more of the `count` objects named before, without their name.

    "two birds on a wire, three on the roof", "a red apple and two green ones", "a dog and another".
    """
    word, before = words[at], words[at - 1]
    if word in lexicon.PRONOUNS or (word == "one" and before in lexicon.ONE_MORE):
        return True
    number, end = read_number(word), at + 1
    while number is not None and end < len(words) and words[end] in lexicon.ADJECTIVES:
        end += 1
    after = (*words, "")[end]
    if after and not is_mark(after) and after not in lexicon.STOPS - {"of"}:
        return False
    if word in lexicon.ONE_MORE:
        return is_quantity(before) if word == "more" else before != "one"  # "at one another"
    if word == "one" and end == at + 1 and not ends_phrase(before):
        return True  # "a green one"
    if number is None or not (before == "and" or is_mark(before)):
        return False
    # "a red apple and two green", but "two cats, one black and one white"
    return end == at + 1 or number > count or (before == "and" and words[at - 2] not in lexicon.ADJECTIVES)


def _until_mark(words: Sequence[str]) -> Sequence[str]:
    return words[: next((i for i, word in enumerate(words) if is_mark(word)), len(words))]


def _head(words: Sequence[str], at: int) -> str:
    """Return the last word of the noun phrase that the word at an index is part of."""
    while at + 1 < len(words) and not ends_phrase(words[at + 1]):
        at += 1
    return words[at] if at < len(words) else ""


def _is_elliptic(words: Sequence[str], start: int, first: int) -> bool:
    """Whether a phrase without a noun comes before: "one red and", "a black, an orange and"."""
    at = first
    while at > start and words[at - 1] in lexicon.COORDINATIONS:
        at -= 1
    end = at
    while at > start and words[at - 1] in lexicon.ADJECTIVES:
        at -= 1
    return start < at < end < first and (words[at - 1] in lexicon.ARTICLES or is_quantity(words[at - 1]))


def _is_hedged_after(after: Sequence[str], single: bool) -> bool:
    """Whether words after a noun change its number; a single one may be compared instead ("a dog more beautiful")."""
    clause = [*after]
    if clause and clause[0] == ",":
        del clause[0]
    for hedge in lexicon.AFTER_HEDGES:
        rest = [*clause[len(hedge) :], ""]
        if clause[: len(hedge)] == hedge and (not rest[0] or is_mark(rest[0]) or rest[0] in lexicon.STOPS):
            return True
    if clause[:2] == ["out", "of"]:
        del clause[0]
    # "nine cats in ten", but "two dogs in ten boxes"
    return bool(clause) and clause[0] in lexicon.OUT_OF and _ends_with_number(clause[1:]) and not single


def _ends_with_number(words: Sequence[str]) -> bool:
    return bool(words) and is_quantity(words[0]) and (len(words) == 1 or ends_phrase(words[1]))


def _describes(after: str, second: str, match: Match, many: bool) -> bool:
    """Whether a noun may describe the word after it: "car park", but not "car in", "car parked in", "car drives"."""
    if after == "'":
        return True  # "two dogs' bowls"
    if after in lexicon.AFTER or ends_phrase(after):
        return False
    if not match.singular or (many and match.plural):
        return looks_plural(after)  # "two fish tanks", but "two dogs sleep"
    if second.endswith("ly"):
        return False  # "a cat sleeping peacefully"
    participle = re.fullmatch(r"\w{2,}([^e]ed|ing)", after) is not None and after not in lexicon.NOUNS_IN_ING
    return not ((participle or looks_plural(after)) and (second in lexicon.AFTER or ends_phrase(second)))
