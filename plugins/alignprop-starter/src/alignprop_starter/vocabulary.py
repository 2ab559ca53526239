"""The words of the starter world: animals, numbers, styles, places; captions written from them and read back. No
torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

#: AlignProp's 45 training animals, in its order, then its 6 held-out ones.
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

#: Each place with the phrase that names it at a caption's end.
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
    """Return the plural of an animal's name: ``mouse`` -> ``mice``, ``cat`` -> ``cats``."""
    return _IRREGULAR.get(animal, animal + "s")


_BY_NOUN = {plural(name): name for name in SPECIES} | {name: name for name in SPECIES}
_NUMBERS = (
    {"a": 1, "an": 1}
    | {word: i + 1 for i, word in enumerate(NUMBER_WORDS)}
    | {str(i + 1): i + 1 for i in range(MAX_NUMBER)}
)

#: Every word a caption can hold; the tokenizer keeps each of them whole.
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
class Wish:
    """What a caption asks for; ``None`` where it leaves the choice open."""

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
    """Write a caption, e.g. ``three flat foxes in a meadow``, ``a fox``, ``foxes in the snow``, ``3d fox``.

    Args:
        species: one of `SPECIES`.
        number: 1 to 4, or the word to write for it (``"one"``, ``"3"``), or None to leave it open.
        style: one of `STYLES`, or None.
        background: one of `BACKGROUNDS`, or None.
        many: with an open number, write the plural (two or more) rather than the bare name (any number).
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


def read_caption(text: str) -> Wish:
    """Read the wishes out of any text; words that name nothing here are passed over.

    The number is the last number word before the animal: in ``fox in a meadow`` the article is the meadow's.
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
    return Wish(species, number if species else None, style, background)
