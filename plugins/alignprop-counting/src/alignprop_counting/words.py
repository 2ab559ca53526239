"""English nouns and numbers: plural forms of class names, and number words. No torch."""

from __future__ import annotations

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

_BELOW_TWENTY = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_BY_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_UNITS = _BELOW_TWENTY.split()
_TENS = {word: 10 * i for i, word in enumerate(_BY_TENS.split(), 2)}

ARTICLES = frozenset({"a", "an", "another"})
NEGATIONS = frozenset({"no", "without"})
DENIALS = frozenset({"not", "neither", "nor", "never"})
"""Words that turn a noun down in ways a prompt's reader does not follow; so do "isn't" and the like."""
SCALES = frozenset({"hundred", "thousand", "million", "billion"})
GROUPS = {"pair": 2, "couple": 2, "trio": 3, "dozen": 12}
"""Words that are a number themselves, `of` or not: "a pair of cats", "two dozen bees"."""
_OF_TWO_PARTS = (
    "skis scissors glasses sunglasses goggles binoculars pliers tweezers tongs headphones trousers pants jeans shorts"
)
PAIRED = frozenset(_OF_TWO_PARTS.split())
"""Names of one object that is called a pair: "a pair of scissors"."""
HEDGES = frozenset({"about", "around", "nearly", "almost", "approximately", "roughly", "circa", "some", "maybe"})
"""Words that make the number after them a rough one."""
PARTS = frozenset({"half", "some", "most", "many", "few", "several", "none", "part", "any"})
"""Words that with `of` leave open how many of the number after them are meant: "most of five dogs"."""

_NO_ADJECTIVES = (
    "of and with in on at near by beside behind under over above below between from to into or but nor while as the "
    "is are this that these those his her its their my your"
)
STOPS = frozenset(_NO_ADJECTIVES.split())
"""Words that cannot stand between a number and its noun."""


def plurals(noun: str) -> frozenset[str]:
    """Return the plural forms of a lower-case noun; of several words the last is changed: `traffic lights`."""
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
        elif last.endswith("fe") and not last.endswith("ffe"):
            forms = {last[:-2] + "ves", last + "s"}
        elif last.endswith("f") and not last.endswith("ff"):
            forms = {last[:-1] + "ves", last + "s"}
        elif last.endswith("o"):
            forms = {last + "s", last + "es"}
        else:
            forms = {last + "s"}
    return frozenset(before + form for form in forms)


def number_of(word: str) -> int | None:
    """Read a lower-case number: digits, or a word up to ninety-nine; None if it is none. Articles are not numbers."""
    if word.isascii() and word.isdigit() and len(word) <= 4:
        return int(word)
    if word in _UNITS:
        return _UNITS.index(word)
    tens, _, unit = word.partition("-")
    if tens in _TENS and not unit:
        return _TENS[tens]
    if tens in _TENS and unit in _UNITS[1:10]:
        return _TENS[tens] + _UNITS.index(unit)
    return None
