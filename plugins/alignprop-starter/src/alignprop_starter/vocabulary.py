"""Vocabulary of the starter's captions (animals, numbers, styles, places), and functions to write and parse captions.

Imports no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: AlignProp's 45 training animals in its order, and its 6 held-out animals.
TRAIN_ANIMALS = (
    "cat",
    "dog",
    "horse",
    "monkey",
    "rabbit",
    "zebra",
    "spider",
    "bird",
    "sheep",
    "deer",
    "cow",
    "goat",
    "lion",
    "tiger",
    "bear",
    "raccoon",
    "fox",
    "wolf",
    "lizard",
    "beetle",
    "ant",
    "butterfly",
    "fish",
    "shark",
    "whale",
    "dolphin",
    "squirrel",
    "mouse",
    "rat",
    "snake",
    "turtle",
    "frog",
    "chicken",
    "duck",
    "goose",
    "bee",
    "pig",
    "turkey",
    "fly",
    "llama",
    "camel",
    "bat",
    "gorilla",
    "hedgehog",
    "kangaroo",
)
HELDOUT_ANIMALS = ("snail", "hippopotamus", "cheetah", "crocodile", "lobster", "octopus")
SPECIES = TRAIN_ANIMALS + HELDOUT_ANIMALS
STYLES = ("3d", "flat", "noto")
NUMBER_WORDS = ("one", "two", "three", "four")
MAX_NUMBER = len(NUMBER_WORDS)

#: Place -> the phrase at the end of a caption.
PLACES = {
    "meadow": "in a meadow",
    "desert": "in the desert",
    "beach": "on the beach",
    "snow": "in the snow",
    "forest": "in the forest",
    "mountains": "in the mountains",
    "night": "at night",
    "autumn": "in autumn",
}
BACKGROUNDS = tuple(PLACES)

_IRREGULAR = {
    "sheep": "sheep",
    "deer": "deer",
    "fish": "fish",
    "wolf": "wolves",
    "mouse": "mice",
    "goose": "geese",
    "fly": "flies",
    "butterfly": "butterflies",
    "fox": "foxes",
    "octopus": "octopuses",
    "hippopotamus": "hippopotamuses",
}


def plural(animal: str) -> str:
    """Return the plural of an animal's name: "mouse" -> "mice", "cat" -> "cats"."""
    return _IRREGULAR.get(animal, animal + "s")


_BY_NOUN = {plural(name): name for name in SPECIES} | {name: name for name in SPECIES}
_NUMBERS = (
    {"a": 1, "an": 1}
    | {word: i + 1 for i, word in enumerate(NUMBER_WORDS)}
    | {str(i + 1): i + 1 for i in range(MAX_NUMBER)}
)

#: All words of captions; each one is a single token.
WORDS = tuple(
    sorted(
        set(_BY_NOUN)
        | set(_NUMBERS)
        | {w for w in STYLES if w != "3d"}
        | {w for p in PLACES.values() for w in p.split()}
        | {"d"}
    )
)


@dataclass(frozen=True)
class Request:
    """What a caption asks for; None if it does not name the attribute."""

    species: str | None = None
    number: int | None = None
    style: str | None = None
    background: str | None = None


def caption(
    species: str,
    number: int | str | None = None,
    style: str | None = None,
    background: str | None = None,
    *,
    many: bool = False,
) -> str:
    """Write a caption, such as "three flat foxes in a meadow", "a fox", "foxes in the snow" or "3d fox".

    Args:
        species: one of `SPECIES`.
        number: 1 to 4, the word to use for it ("one", "3"), or None to not name it.
        style: one of `STYLES`, or None.
        background: one of `BACKGROUNDS`, or None.
        many: if no number is named, use the plural (two or more) instead of the bare name (any number).
    """
    count = _NUMBERS[number] if isinstance(number, str) else number
    noun = plural(species) if (count or 0) > 1 or (count is None and many) else species
    words = [style, noun] if style else [noun]
    if isinstance(number, str):
        words.insert(0, number)
    elif number == 1:
        words.insert(0, "an" if words[0][0] in "aeiou" else "a")
    elif number is not None:
        words.insert(0, NUMBER_WORDS[number - 1])
    if background:
        words.append(PLACES[background])
    return " ".join(words)


def read_caption(text: str) -> Request:
    """Parse any text; unknown words are ignored.

    The number is the last number word before the animal: in "fox in a meadow" the article belongs to the meadow.
    """
    species = number = style = background = None
    for word in re.findall(r"[a-z0-9]+", text.lower()):
        if word in _BY_NOUN and species is None:
            species = _BY_NOUN[word]
        elif word in _NUMBERS and species is None:
            number = _NUMBERS[word]
        elif word in STYLES:
            style = word
        elif word in PLACES:
            background = word
    return Request(species, number if species else None, style, background)
