"""Renders pairs of scenes that differ in one aspect of composition: a better image, and the same scene with a flaw.

The aspects, and the flaw of the worse image:

- `placement`: animals are moved to an edge or a corner and cut off (better: complete, centered or on thirds);
- `harmony`: the background has patches of clashing colors (better: uniform light);
- `contrast`: animals are blended into the background (better: opaque);
- `clutter`: seven or more props and a strong background texture (better: two or fewer props);
- `damage`: blur, noise or 8x8 blocks (better: none).

Both images of a pair can have further flaws, which are the same in both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from alignprop_starter.scenes import SIZE, Layout, load_artwork, render_layouts, sample_layouts

ASPECTS = ("placement", "harmony", "contrast", "clutter", "damage")
_OTHER_FLAWS = 0.1


@dataclass(frozen=True)
class Pairs:
    """Pairs of images on the device.

    Attributes:
        better, worse: (n, 3, 128, 128) uint8.
        aspect: (n,) int64, index into `ASPECTS`.
    """

    better: Tensor
    worse: Tensor
    aspect: Tensor


@dataclass(frozen=True)
class _Flaws:
    """Random parameters of all flaws of each scene, shared by both images of a pair."""

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
    """Return a mask (B, slots) of the objects that are animals."""
    mask: Tensor = load_artwork().animal[layout.species, layout.style][:, None] == layout.sprite
    return mask


def _flawless(n: int, g: torch.Generator) -> Layout:
    """Return scenes with few props; a single animal is in the center or, smaller, on a vertical third."""
    number = torch.multinomial(torch.tensor([0.0, 0.55, 0.2, 0.15, 0.1]), n, replacement=True, generator=g)
    layout = sample_layouts(n, int(torch.randint(2**31, (1,), generator=g)), split="all", number=number)
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


def _sample_flaws(layout: Layout, g: torch.Generator) -> _Flaws:
    n, slots = layout.sprite.shape

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    way = torch.randint(3, (n, 1), generator=g)  # horizontal, vertical, or into a corner
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
    """Apply the flaws that change the layout: placement, harmony and clutter; `has` is (B, 5) bool.

    The boxes are not updated.
    """
    placed, clashing, cluttered = has[:, :1], has[:, 1], has[:, 3:4]
    animal = _is_animal(layout)
    moved = placed & animal

    def shifted(at: Tensor, by: Tensor) -> Tensor:
        # At least half of each animal stays in the image.
        return torch.where(moved, (at + by).clamp(0, SIZE), at)

    filled = cluttered & (layout.sprite < 0)
    return replace(
        layout,
        x=torch.where(filled, flaws.prop_x, shifted(layout.x, flaws.move[:, :1])),
        y=torch.where(filled, flaws.prop_y, shifted(layout.y, flaws.move[:, 1:])),
        size=torch.where(filled, flaws.prop_size, layout.size),
        sprite=torch.where(filled, flaws.prop, layout.sprite),
        richness=torch.where(cluttered[:, 0], 1.0, layout.richness),
        shade=torch.where(clashing[:, None, None, None], flaws.shade, layout.shade),
    )


def _damaged(images: Tensor, kind: Tensor, strength: Tensor) -> Tensor:
    """Add blur, noise or blocks (kind 0, 1, 2) to images (B, 3, 128, 128); kind and strength are (B,)."""
    s = strength[:, None, None, None]
    blurred = F.interpolate(F.avg_pool2d(images, 4), scale_factor=4.0, mode="bilinear")
    blocks = F.interpolate(F.avg_pool2d(images, 8), scale_factor=8.0, mode="nearest")
    noisy = images + 0.2 * s * torch.randn_like(images)
    k = kind[:, None, None, None]
    return torch.where(
        k == 0, images.lerp(blurred, 0.5 + s / 2), torch.where(k == 1, noisy, images.lerp(blocks, 0.8 * s))
    )


def _render(layout: Layout, flaws: _Flaws, has: Tensor, device: str) -> Tensor:
    """Render images (B, 3, 128, 128), uint8, with the flaws selected by the mask `has` (B, 5)."""
    layout = _rearranged(layout, flaws, has)
    images = render_layouts(layout, device)
    ground = render_layouts(replace(layout, sprite=layout.sprite.masked_fill(_is_animal(layout), -1)), device)
    # Contrast: blend with the same scene without animals.
    fade = (flaws.fade * has[:, 2]).to(device)[:, None, None, None]
    images = images + fade * (ground - images)
    hurt = has[:, 4].to(device)[:, None, None, None]
    images = torch.where(hurt, _damaged(images, flaws.kind.to(device), flaws.strength.to(device)), images)
    return (images.clamp(0, 1) * 255).round().byte()


def render_pairs(n: int, seed: int, device: str, chunk: int = 1024) -> Pairs:
    """Render `n` pairs, with the aspects in turn. Pixel noise uses the device's generator, everything else `seed`."""
    g = torch.Generator().manual_seed(seed)
    layout = _flawless(n, g)
    flaws = _sample_flaws(layout, g)
    aspect = torch.arange(n) % len(ASPECTS)
    this = aspect[:, None] == torch.arange(len(ASPECTS))
    others = (torch.rand(n, len(ASPECTS), generator=g) < _OTHER_FLAWS) & ~this
    images = torch.empty(2, n, 3, SIZE, SIZE, dtype=torch.uint8, device=device)
    for i in range(0, n, chunk):
        part = slice(i, i + chunk)
        for side, has in enumerate((others, others | this)):
            images[side, part] = _render(layout[part], flaws[part], has[part], device)
    return Pairs(images[0], images[1], aspect.to(device))
