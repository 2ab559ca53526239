"""Captions for the starter's CLIP models as token ids on the device, and which captions match which scenes.

A caption does not need to name every attribute, so it can match several scenes in a batch. Matches are exact: the
attributes that a caption names (its *request*) are stored with its tokens and compared with the labels of the scenes.
"""

from __future__ import annotations

import random
import string
from functools import lru_cache
from itertools import accumulate

import torch
from clip_files import CONTEXT
from open_clip import SimpleTokenizer
from torch import Tensor

from alignprop_starter.scenes import MOST_ANIMALS, Layout
from alignprop_starter.vocabulary import BACKGROUNDS, MAX_NUMBER, SPECIES, STYLES, caption

ATTRIBUTES = ("species", "number", "style", "background")
VALUES = {"species": len(SPECIES), "number": MAX_NUMBER, "style": len(STYLES), "background": len(BACKGROUNDS)}
"""Number of values of each attribute that captions can name."""

OPEN, SEVERAL = 0, MOST_ANIMALS + 1
"""Numbers in a request that names no number: any number, or two and more (a plural)."""

#: Forms of the number: not named (bare name, plural), then words and digits for one to four.
_FORMS: tuple[int | str | None, ...] = (None, None, 1, 2, 3, 4, "one", "1", "2", "3", "4")
_BEFORE = ("a photo of", "a picture of", "photo of", "an image of", "cute", "beautiful", "a drawing of", "please,")
_AFTER = (".", "!", ", highly detailed", ", very nice", ", high quality", ", please")
#: Probabilities that `alter` changes each attribute. The number is the hardest to learn.
_ALTERED = (0.3, 0.4, 0.15, 0.15)


def labels(layout: Layout, device: str) -> Tensor:
    """Return int64 labels (4, n) in the order of `ATTRIBUTES`; the number is the number itself, 0 to 6."""
    return torch.stack([layout.species, layout.number, layout.style, layout.background]).to(device)


def matches(requests: Tensor, truth: Tensor) -> Tensor:
    """Return a mask (C, B): whether caption c matches scene b.

    Args:
        requests: (4, C) attributes that captions name: indices, -1 for a style or place that is not named, `OPEN` or
            `SEVERAL` for a number that is not named.
        truth: (4, B) labels of scenes, see `labels`. A scene without animals matches no caption.
    """
    # (C, 1) against (1, B).
    species, number, style, place = requests[:, :, None]
    is_species, is_number, is_style, is_place = truth[:, None, :]
    counted = (number == is_number) | (number == OPEN) | ((number == SEVERAL) & (is_number > 1))
    fits: Tensor = (
        (species == is_species)
        & (is_number > 0)
        & counted
        & ((style < 0) | (style == is_style))
        & ((place < 0) | (place == is_place))
    )
    return fits


def alter(truth: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Change one attribute of each scene; a number becomes another one from one to four.

    Args:
        truth: (4, B) labels.
        generator: source of randomness; by default that of the device.

    Returns:
        Changed labels (4, B), and the index of the changed attribute (B,).
    """
    luck = torch.rand(5, truth.shape[1], device=truth.device, generator=generator)
    which = torch.zeros_like(truth[0])
    for edge in accumulate(_ALTERED[:-1]):
        which += luck[4] > edge
    changed = []
    for i, (old, (name, count)) in enumerate(zip(truth, VALUES.items(), strict=True)):
        lowest = int(name == "number")
        other = (luck[i] * count).long()
        other = torch.where(other == old - lowest, (other + 1) % count, other) + lowest
        changed.append(torch.where(which == i, other, old))
    return torch.stack(changed), which


class Captions:
    """All captions as token ids, in a table on the device.

    The row index is (species, form of the number, style or none, background or none, variant), in row-major order.
    Variant 0 is the plain caption. Variant 1 has other words around it, mostly unknown tokens, so that the model learns
    to ignore the rest of a prompt.

    Attributes:
        table: (rows, 32) int32 token ids of open_clip.
        known: (n,) int64, ascending token ids that have their own embedding.
    """

    def __init__(self, device: str) -> None:
        tokenizer = SimpleTokenizer(context_length=CONTEXT)
        # Captions share a few hundred words, and tokens never span words, so each word is tokenized once.
        encode = lru_cache(maxsize=None)(tokenizer.encode)
        start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
        rng = random.Random(0)
        rows: list[list[int]] = []
        known = {start, end}
        for animal in SPECIES:
            for form, number in enumerate(_FORMS):
                for style in (None, *STYLES):
                    for place in (None, *BACKGROUNDS):
                        plain = [
                            t for w in caption(animal, number, style, place, many=form == 1).split() for t in encode(w)
                        ]
                        known.update(plain)
                        before, after = ([t for w in text.split() for t in encode(w)] for text in _around(rng))
                        rows += [[start, *plain, end], [start, *before, *plain, *after, end]]
        for word in " ".join((*_BEFORE, *_AFTER)).split():
            known.update(encode(word))
        self.table = torch.tensor([row + [0] * (CONTEXT - len(row)) for row in rows], dtype=torch.int32, device=device)
        self.known = torch.tensor(sorted(known))

    def rows(self, requests: Tensor, form: Tensor | None = None, variant: Tensor | None = None) -> Tensor:
        """Return token ids (C, 32) of captions that name exactly the given attributes.

        Args:
            requests: (4, C), see `matches`; the number is 1 to 4, `OPEN` or `SEVERAL`.
            form: (C,) index of the form of a named number; by default "a" and number words.
            variant: (C,) bool, whether other words surround the caption.
        """
        species, number, style, place = requests
        form = number + 1 if form is None else form
        form = torch.where(number == OPEN, 0, torch.where(number == SEVERAL, 1, form))
        row = ((species * len(_FORMS) + form) * (len(STYLES) + 1) + style + 1) * (len(BACKGROUNDS) + 1) + place + 1
        row = row * 2 if variant is None else row * 2 + variant.long()
        return self.table[row].long()

    def sample(self, truth: Tensor, named: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sample a matching caption for each scene, with attributes omitted at random; no host synchronization.

        Args:
            truth: (4, B) labels of scenes with animals; numbers above four are never named.
            named: (B,) index of an attribute that the caption must name, if it can.

        Returns:
            Token ids (B, 32), and requests (4, B).
        """
        species, number, style, place = truth
        b, device = truth.shape[1], truth.device
        luck = torch.rand(6, b, device=device)
        names = (luck[:4] < 0.7) | (luck[4] < 0.3)
        if named is not None:
            names |= named == torch.arange(4, device=device)[:, None]
        # Half of the captions without a number use the plural, if there are several animals.
        loose = torch.where((luck[1] > 0.85) & (number > 1), SEVERAL, OPEN)
        requests = torch.stack(
            [
                species,
                torch.where(names[1] & (number <= MAX_NUMBER), number, loose),
                torch.where(names[2], style, -1),
                torch.where(names[3], place, -1),
            ]
        )
        form = torch.where(luck[5] < 0.2, number + 6, number + 1)
        form = torch.where((number == 1) & (luck[5] > 0.2) & (luck[5] < 0.4), 6, form)  # "one" as well as "a"
        return self.rows(requests, form, luck[5] > 0.85), requests


def _around(rng: random.Random) -> tuple[str, str]:
    """Return random words to put before and after a caption."""
    luck = rng.random()
    if luck < 0.4:
        return rng.choice(_BEFORE), ""
    noise = " ".join(
        "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(2, 6))) for _ in range(rng.randint(1, 2))
    )
    if luck < 0.6:
        return "", rng.choice(_AFTER)
    return (noise, "") if luck < 0.8 else ("", noise)
