"""Captions for the starter's CLIP family: every form a caption can take, as token ids on the device, and which
captions fit which scenes.

A caption need not name everything, so in a batch it often fits other scenes than its own. Nothing here guesses: what a
caption names (its *wish*) is kept beside its tokens and compared with the scenes' labels.
"""

from __future__ import annotations

import random
import string
from functools import lru_cache
from itertools import accumulate

import torch
from open_clip import SimpleTokenizer
from torch import Tensor

from alignprop_starter.make.clip_files import CONTEXT
from alignprop_starter.scenes import MOST_ANIMALS, Layout
from alignprop_starter.vocabulary import BACKGROUNDS, MAX_NUMBER, SPECIES, STYLES, caption

ATTRIBUTES = ("species", "number", "style", "background")
SPREAD = {"species": len(SPECIES), "number": MAX_NUMBER, "style": len(STYLES), "background": len(BACKGROUNDS)}
"""How many values of each attribute captions can name."""

OPEN, SEVERAL = 0, MOST_ANIMALS + 1
"""What a wish says of the number where it names none: any at all, or (a plural) two and more."""

#: Ways to write the number: bare name, plural, then words and digits for one to four.
_FORMS: tuple[int | str | None, ...] = (None, None, 1, 2, 3, 4, "one", "1", "2", "3", "4")
_BEFORE = ("a photo of", "a picture of", "photo of", "an image of", "cute", "beautiful", "a drawing of", "please,")
_AFTER = (".", "!", ", highly detailed", ", very nice", ", high quality", ", please")
#: How often `alter` changes each attribute: the number is the hardest to see.
_ALTERED = (0.3, 0.4, 0.15, 0.15)


def labels(layout: Layout, device: str) -> Tensor:
    """(4, n) int64 labels in the order of `ATTRIBUTES`; the number is the number itself, 0 to 6."""
    return torch.stack([layout.species, layout.number, layout.style, layout.background]).to(device)


def matches(wishes: Tensor, truth: Tensor) -> Tensor:
    """Return (C, B) bool: whether caption c fits scene b.

    Args:
        wishes: (4, C) what captions name: indices, -1 for a style or place left open, `OPEN` or `SEVERAL` for a number
            left open.
        truth: (4, B) labels of scenes, see `labels`. A scene without animals fits no caption.
    """
    species, number, style, place = wishes[:, :, None]
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
    """Change one attribute of each scene's labels (4, B), the number to another from one to four; return the new
    labels and which attribute it was, (B,)."""
    luck = torch.rand(5, truth.shape[1], device=truth.device, generator=generator)
    which = torch.zeros_like(truth[0])
    for edge in accumulate(_ALTERED[:-1]):
        which += luck[4] > edge
    changed = []
    for i, (old, (name, count)) in enumerate(zip(truth, SPREAD.items(), strict=True)):
        lowest = int(name == "number")
        other = (luck[i] * count).long()
        other = torch.where(other == old - lowest, (other + 1) % count, other) + lowest
        changed.append(torch.where(which == i, other, old))
    return torch.stack(changed), which


class Captions:
    """All captions there are, tokenised: a table (species, form of the number, style or none, background or none,
    variant) of token ids.

    Variant 0 is the plain caption; variant 1 has words around it that mean nothing here, most of them unknown tokens,
    so that the model learns to pass over whatever else a prompt says.

    Attributes:
        table: (rows, 32) int32 token ids in open_clip's numbering.
        known: (n,) int64, ascending: the tokens that get an embedding of their own.
    """

    def __init__(self, device: str) -> None:
        tokenizer = SimpleTokenizer(context_length=CONTEXT)
        # Captions share a few hundred words and the tokenizer never joins words: each is tokenised once.
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

    def rows(self, wishes: Tensor, form: Tensor | None = None, variant: Tensor | None = None) -> Tensor:
        """Return (C, 32) int64 token ids of captions that say just `wishes` (4, C), see `matches`.

        Args:
            wishes: the number is 1 to 4, `OPEN` or `SEVERAL`.
            form: (C,) how a named number is written, as an index into the forms; if not given as "a" and words.
            variant: (C,) bool: with words around it.
        """
        species, number, style, place = wishes
        form = number + 1 if form is None else form
        form = torch.where(number == OPEN, 0, torch.where(number == SEVERAL, 1, form))
        row = ((species * len(_FORMS) + form) * (len(STYLES) + 1) + style + 1) * (len(BACKGROUNDS) + 1) + place + 1
        row = row * 2 if variant is None else row * 2 + variant.long()
        return self.table[row].long()

    def draw(self, truth: Tensor, named: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draw a fitting caption for each scene, attributes left out at random; no waiting for the device.

        Args:
            truth: (4, B) labels of scenes with animals; numbers beyond four are left open.
            named: (B,) an attribute each caption must name, where it can.

        Returns:
            Token ids (B, 32) and the wishes (4, B).
        """
        species, number, style, place = truth
        b, device = truth.shape[1], truth.device
        luck = torch.rand(6, b, device=device)
        names = (luck[:4] < 0.7) | (luck[4] < 0.3)
        if named is not None:
            names |= named == torch.arange(4, device=device)[:, None]
        # Half of the captions that name no number say the plural where it fits.
        loose = torch.where((luck[1] > 0.85) & (number > 1), SEVERAL, OPEN)
        wishes = torch.stack(
            [
                species,
                torch.where(names[1] & (number <= MAX_NUMBER), number, loose),
                torch.where(names[2], style, -1),
                torch.where(names[3], place, -1),
            ]
        )
        form = torch.where(luck[5] < 0.2, number + 6, number + 1)
        form = torch.where((number == 1) & (luck[5] > 0.2) & (luck[5] < 0.4), 6, form)  # "one" beside "a"
        return self.rows(wishes, form, luck[5] > 0.85), wishes


def _around(rng: random.Random) -> tuple[str, str]:
    """Words before and after a caption."""
    luck = rng.random()
    if luck < 0.4:
        return rng.choice(_BEFORE), ""
    noise = " ".join(
        "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(2, 6))) for _ in range(rng.randint(1, 2))
    )
    if luck < 0.6:
        return "", rng.choice(_AFTER)
    return (noise, "") if luck < 0.8 else ("", noise)
