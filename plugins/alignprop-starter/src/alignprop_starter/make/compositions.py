"""Pairs of pictures that differ in one choice of composition, rendered by the scene generator: the better one, and the
same scene with a flaw added.

The five aspects, and what the worse picture has:

- ``placement``: the animals moved to an edge or a corner and cut off there (better: whole, centred or on thirds);
- ``harmony``: patches of clashing colours over the ground (better: one light over all of it);
- ``contrast``: the animals faded into the ground (better: as drawn);
- ``clutter``: seven props and more, on a rich ground (better: two or fewer);
- ``damage``: blur, noise or 8x8 blocks (better: none).

Either picture may have other flaws too, the same in both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from alignprop_starter.scenes import SIZE, Layout, draw_layouts, load_artwork, paint

ASPECTS = ("placement", "harmony", "contrast", "clutter", "damage")
_OTHER_FLAWS = 0.1


@dataclass(frozen=True)
class Pairs:
    """Attributes:
    better, worse: (n, 3, 128, 128) uint8 on the device.
    aspect: (n,) int64 on the device, index into `ASPECTS`.
    """

    better: Tensor
    worse: Tensor
    aspect: Tensor


@dataclass(frozen=True)
class _Flaws:
    """How the flaws of each scene would look, drawn once so that both pictures of a pair share them."""

    move: Tensor
    shade: Tensor
    fade: Tensor
    kind: Tensor
    strength: Tensor
    prop: Tensor
    prop_x: Tensor
    prop_y: Tensor
    prop_size: Tensor

    def __getitem__(self, rows: slice) -> _Flaws:
        return _Flaws(**{name: value[rows] for name, value in vars(self).items()})


def _is_animal(layout: Layout) -> Tensor:
    """(B, slots) bool."""
    drawn: Tensor = load_artwork().animal[layout.species, layout.style][:, None] == layout.sprite
    return drawn


def _flawless(n: int, g: torch.Generator) -> Layout:
    """Scenes with few props; a single animal stands in the middle or, smaller, on one of the vertical thirds."""
    number = torch.multinomial(torch.tensor([0.0, 0.55, 0.2, 0.15, 0.1]), n, replacement=True, generator=g)
    layout = draw_layouts(n, int(torch.randint(2**31, (1,), generator=g)), split="all", number=number)
    animal = _is_animal(layout)
    kept = torch.rand(animal.shape, generator=g) < 0.25
    side = torch.where(torch.rand(n, 1, generator=g) < 0.5, 43.0, 85.0)
    on_third = animal & ((number == 1) & (torch.rand(n, generator=g) < 0.4))[:, None]
    return replace(
        layout,
        sprite=torch.where(animal | kept, layout.sprite, -1),
        x=torch.where(on_third, side, layout.x),
        size=torch.where(on_third, layout.size * 0.7, layout.size),
        richness=layout.richness * 0.7,
    )


def _draw_flaws(layout: Layout, g: torch.Generator) -> _Flaws:
    n, slots = layout.sprite.shape

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    way = torch.randint(3, (n, 1), generator=g)  # sideways, up or down, into a corner
    along = torch.cat([way != 1, way != 0], 1)
    sign = torch.where(torch.rand(n, 2, generator=g) < 0.5, -1.0, 1.0)
    props = load_artwork().prop
    return _Flaws(
        move=along * sign * between(44, 60, 1),
        shade=1 + between(-0.6, 0.6, 3, 3, 3),
        fade=between(0.5, 0.8),
        kind=torch.randint(3, (n,), generator=g),
        strength=between(0.5, 1),
        prop=props[torch.randint(len(props), (n, slots), generator=g), layout.style[:, None]],
        prop_x=between(4, 124, slots),
        prop_y=between(10, 120, slots),
        prop_size=between(18, 34, slots),
    )


def _rearranged(layout: Layout, flaws: _Flaws, has: Tensor) -> Layout:
    """The flaws that are a matter of the layout: placement, harmony, clutter; `has` is (B, 5) bool. The boxes are left
    as they were."""
    placed, clashing, cluttered = has[:, :1], has[:, 1], has[:, 3:4]
    animal = _is_animal(layout)
    moved = placed & animal

    def go(at: Tensor, by: Tensor) -> Tensor:
        # No animal leaves the picture whole: at the least, half of it stays.
        return torch.where(moved, (at + by).clamp(0, SIZE), at)

    filled = cluttered & (layout.sprite < 0)
    return replace(
        layout,
        x=torch.where(filled, flaws.prop_x, go(layout.x, flaws.move[:, :1])),
        y=torch.where(filled, flaws.prop_y, go(layout.y, flaws.move[:, 1:])),
        size=torch.where(filled, flaws.prop_size, layout.size),
        sprite=torch.where(filled, flaws.prop, layout.sprite),
        richness=torch.where(cluttered[:, 0], 1.0, layout.richness),
        shade=torch.where(clashing[:, None, None, None], flaws.shade, layout.shade),
    )


def _damaged(images: Tensor, kind: Tensor, strength: Tensor) -> Tensor:
    """Blur, noise or blocks (kind 0, 1, 2), (B,) each."""
    s = strength[:, None, None, None]
    blurred = F.interpolate(F.avg_pool2d(images, 4), scale_factor=4.0, mode="bilinear")
    blocks = F.interpolate(F.avg_pool2d(images, 8), scale_factor=8.0, mode="nearest")
    noisy = images + 0.2 * s * torch.randn_like(images)
    k = kind[:, None, None, None]
    return torch.where(
        k == 0, images.lerp(blurred, 0.5 + s / 2), torch.where(k == 1, noisy, images.lerp(blocks, 0.8 * s))
    )


def _render(layout: Layout, flaws: _Flaws, has: Tensor, device: str) -> Tensor:
    """Return (B, 3, 128, 128) uint8 with the flaws that `has` (B, 5) says."""
    layout = _rearranged(layout, flaws, has)
    images = paint(layout, device)
    ground = paint(replace(layout, sprite=layout.sprite.masked_fill(_is_animal(layout), -1)), device)
    fade = (flaws.fade * has[:, 2]).to(device)[:, None, None, None]
    images = images + fade * (ground - images)
    hurt = has[:, 4].to(device)[:, None, None, None]
    images = torch.where(hurt, _damaged(images, flaws.kind.to(device), flaws.strength.to(device)), images)
    return (images.clamp(0, 1) * 255).round().byte()


def render_pairs(n: int, seed: int, device: str, chunk: int = 1024) -> Pairs:
    """Render `n` pairs, aspects by turns. The noise comes from the device's own generator, all else from `seed`."""
    g = torch.Generator().manual_seed(seed)
    layout = _flawless(n, g)
    flaws = _draw_flaws(layout, g)
    aspect = torch.arange(n) % len(ASPECTS)
    this = aspect[:, None] == torch.arange(len(ASPECTS))
    others = (torch.rand(n, len(ASPECTS), generator=g) < _OTHER_FLAWS) & ~this
    pictures = torch.empty(2, n, 3, SIZE, SIZE, dtype=torch.uint8, device=device)
    for i in range(0, n, chunk):
        part = slice(i, i + chunk)
        for side, has in enumerate((others, others | this)):
            pictures[side, part] = _render(layout[part], flaws[part], has[part], device)
    return Pairs(pictures[0], pictures[1], aspect.to(device))
