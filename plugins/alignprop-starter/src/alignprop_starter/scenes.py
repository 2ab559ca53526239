"""Renders the starter's scenes: seeded batches of animals in places, with complete labels, on any torch device.

    scenes = render_scenes(64, seed=0)
    scenes.images      # (64, 3, 128, 128) float32 in [0, 1]
    scenes.captions()  # ["three flat foxes in a meadow", ...]

All random numbers are generated on the CPU: a seed gives the same scenes on every device, up to rounding of pixels.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib.resources import files
from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from alignprop_starter.vocabulary import BACKGROUNDS, MAX_NUMBER, SPECIES, STYLES, caption

SIZE = 128
#: Maximum number of animals in a scene; captions name up to four.
MOST_ANIMALS = 6
#: Sprites are stored at these resolutions in pixels (mipmaps); an object uses the smallest that is at least its size.
#: A bilinear lookup in a much larger image would alias, and in a smaller one it would blur.
_LEVELS = (96, 76, 60, 48, 38, 30, 22)

#: Objects of each place: (name, minimum and maximum size in pixels). Large ones are placed near the horizon.
_GROUND: dict[str, tuple[tuple[str, int, int], ...]] = {
    "meadow": (
        ("tree", 36, 54),
        ("tulip", 20, 30),
        ("sunflower", 24, 36),
        ("blossom", 20, 28),
        ("herb", 18, 28),
        ("hyacinth", 20, 30),
    ),
    "desert": (("cactus", 28, 48), ("rock", 18, 30), ("hut", 30, 44), ("log", 18, 26), ("cactus", 24, 36)),
    "beach": (("palm", 40, 58), ("shell", 16, 24), ("parasol", 28, 42), ("coral", 20, 30), ("rock", 16, 26)),
    "snow": (("fir", 34, 54), ("snowman", 26, 38), ("house", 30, 42), ("rock", 16, 24)),
    "forest": (("fir", 36, 56), ("tree", 38, 56), ("mushroom", 18, 28), ("herb", 18, 28), ("log", 20, 30)),
    "mountains": (("fir", 28, 44), ("rock", 20, 34), ("tent", 28, 38), ("herb", 16, 24)),
    "night": (("fir", 34, 52), ("tent", 28, 38), ("house", 30, 42), ("mushroom", 18, 26)),
    "autumn": (
        ("maple leaf", 18, 28),
        ("fallen leaf", 18, 28),
        ("pumpkin", 20, 30),
        ("chestnut", 16, 24),
        ("sheaf", 24, 36),
        ("mushroom", 18, 28),
    ),
}
_SKY: dict[str, tuple[tuple[str, int, int], ...]] = {
    "meadow": (("cloud", 22, 36), ("sun", 22, 30)),
    "desert": (("sun", 24, 34), ("cloud", 18, 28)),
    "beach": (("cloud", 20, 34), ("sun", 22, 32)),
    "snow": (("snowflake", 14, 22), ("cloud", 20, 34)),
    "forest": (("maple leaf", 12, 18), ("herb", 14, 20)),
    "mountains": (("cloud", 18, 32), ("sun", 18, 26)),
    "night": (("moon", 22, 32), ("star", 12, 18)),
    "autumn": (("cloud", 20, 32), ("fallen leaf", 14, 20)),
}
_PROPS = tuple(sorted({p[0] for table in (_GROUND, _SKY) for props in table.values() for p in props}))
_SKY_SLOTS, _GROUND_SLOTS, _FRONT_SLOTS = 2, 4, 1


@dataclass(frozen=True)
class Artwork:
    """The images that scenes are composed of, on one device.

    Attributes:
        sprites: (levels * sprites, 4, 96, 96) uint8, premultiplied RGBA; all sprites at the first level, then all at
            the next.
        panoramas: (8, 3, 128, 256) RGB in [0, 1], one per place.
        plain: the panoramas without texture (blurred).
        animal: (51, 3) sprite index by species and style; prop: (props, 3) sprite index by prop and style.
    """

    sprites: Tensor
    panoramas: Tensor
    plain: Tensor
    animal: Tensor
    prop: Tensor

    @property
    def count(self) -> int:
        """Number of sprites, without their levels."""
        return self.sprites.shape[0] // len(_LEVELS)


def _read_image(name: str, mode: str) -> Tensor:
    data = (files("alignprop_starter") / "artwork" / name).read_bytes()
    return torch.from_numpy(np.array(Image.open(BytesIO(data)).convert(mode))).permute(2, 0, 1).float() / 255


@lru_cache(maxsize=4)
def load_artwork(device: str = "cpu") -> Artwork:
    """Return the artwork of this package; loaded once per device."""
    index = json.loads((files("alignprop_starter") / "artwork" / "index.json").read_text())
    side, columns = index["sprite"], index["columns"]
    sheet = _read_image("sprites.webp", "RGBA")
    # (4, rows * side, columns * side) -> (cells, 4, side, side); the last row of the sheet can have empty cells.
    cells = sheet.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).reshape(-1, 4, side, side)
    sprites = cells[: len(index["sprites"])].clone()
    assert cells.shape[0] % columns == 0
    sprites[:, :3] *= sprites[:, 3:]  # premultiplied: interpolation must not mix in the color of transparent pixels
    levels = [sprites]
    for level in _LEVELS[1:]:
        small = F.interpolate(sprites, size=(level, level), mode="bilinear", antialias=True)
        levels.append(F.interpolate(small, size=(side, side), mode="bicubic").clamp(0, 1))
    # The sheet stacks places vertically: (3, 8 * 128, 256) -> (8, 3, 128, 256).
    panoramas = _read_image("panoramas.webp", "RGB").reshape(3, len(BACKGROUNDS), SIZE, -1).transpose(0, 1).contiguous()
    where = {name: i for i, name in enumerate(index["sprites"])}
    return Artwork(
        sprites=torch.cat([(level * 255).round().byte() for level in levels]).to(device),
        panoramas=panoramas.to(device),
        plain=_smooth(panoramas).to(device),
        animal=torch.tensor([[where[f"{style}/{name}"] for style in STYLES] for name in SPECIES]),
        prop=torch.tensor([[where[f"{style}/{name}"] for style in STYLES] for name in _PROPS]),
    )


def _smooth(panoramas: Tensor, sigma: float = 7.0) -> Tensor:
    """Gaussian blur, circular in x."""
    reach = int(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    flat = panoramas.flatten(0, 1).unsqueeze(1)
    flat = F.conv2d(F.pad(flat, (reach, reach, 0, 0), mode="circular"), kernel)
    flat = F.conv2d(F.pad(flat, (0, 0, reach, reach), mode="replicate"), kernel.transpose(2, 3))
    return flat.view_as(panoramas)


@lru_cache(maxsize=1)
def heldout_combinations() -> Tensor:
    """Return a mask (51, 3, 4, 8) of the combinations of species, style, number - 1 and background that are excluded
    from training (10%)."""
    total = len(SPECIES) * len(STYLES) * MAX_NUMBER * len(BACKGROUNDS)
    chosen = random.Random(20).sample(range(total), total // 10)
    mask = torch.zeros(total, dtype=torch.bool)
    mask[torch.tensor(chosen)] = True
    return mask.view(len(SPECIES), len(STYLES), MAX_NUMBER, len(BACKGROUNDS))


@dataclass(frozen=True)
class Layout:
    """Complete description of a batch of scenes; CPU tensors whose first axis is the scene.

    Attributes:
        species, style, background: (B,) indices into `SPECIES`, `STYLES`, `BACKGROUNDS`.
        number: (B,) number of animals, 0 to 6.
        window: (B,) left edge of the crop of the panorama, in multiples of 8 pixels.
        richness: (B,) strength of the background's texture, from 0 (smooth) to 1 (as in the artwork).
        shade: (B, 3, 3, 3) factors on brightness and color, (channel, y, x), interpolated over the image.
        sprite, x, y, size, flip: (B, slots) objects from back to front: sprite index (-1 in empty slots), center and
            size in pixels, mirrored or not.
        boxes: (B, 6, 4) boxes of the animals (left, top, right, bottom) in pixels, clipped to the image; zeros
            beyond `number`.
    """

    species: Tensor
    style: Tensor
    background: Tensor
    number: Tensor
    window: Tensor
    richness: Tensor
    shade: Tensor
    sprite: Tensor
    x: Tensor
    y: Tensor
    size: Tensor
    flip: Tensor
    boxes: Tensor

    def __len__(self) -> int:
        return self.species.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Layout:
        return Layout(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


@dataclass(frozen=True)
class Scenes:
    """Rendered scenes: `images` (B, 3, 128, 128) float32 in [0, 1], and the `Layout` with their labels."""

    images: Tensor
    layout: Layout

    def captions(self) -> list[str]:
        """Return the full caption of each scene: number (up to four), style, species and background."""
        a = self.layout
        return [
            caption(SPECIES[s], n if 1 <= n <= MAX_NUMBER else None, STYLES[t], BACKGROUNDS[b], many=n != 1)
            for s, n, t, b in zip(
                a.species.tolist(), a.number.tolist(), a.style.tolist(), a.background.tolist(), strict=True
            )
        ]


def _uniform(shape: Sequence[int], low: float | Tensor, high: float | Tensor, g: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(tuple(shape), generator=g)


def _cells(number: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return centers x, y and sizes of the animals, (B, 6) each: one large in the center, up to four in random
    quarters, more in random sixths of the image."""
    n = number.shape[0]
    quarters = torch.tensor([[34.0, 42.0], [94.0, 42.0], [34.0, 93.0], [94.0, 93.0], [64.0, 68.0], [64.0, 68.0]])
    sixths = torch.tensor([[24.0, 42.0], [64.0, 42.0], [104.0, 42.0], [24.0, 92.0], [64.0, 92.0], [104.0, 92.0]])
    order = torch.rand(n, MOST_ANIMALS, generator=g)
    order4 = torch.cat([order[:, :4].argsort(1), torch.tensor([[4, 5]]).expand(n, 2)], 1)
    many = (number > 4)[:, None, None]
    # (B, 6, 2) cell centers, then a random offset that is smaller the more animals there are.
    centers = torch.where(many, sixths[order.argsort(1)], quarters[order4])
    centers = torch.where((number == 1)[:, None, None], torch.tensor([64.0, 70.0]), centers)
    sway = torch.tensor([0.0, 14.0, 8.0, 6.0, 6.0, 3.0, 3.0])[number][:, None, None]
    centers = centers + sway * _uniform((n, MOST_ANIMALS, 2), -1, 1, g)
    low = torch.tensor([0.0, 62.0, 46.0, 42.0, 40.0, 30.0, 30.0])[number][:, None]
    high = torch.tensor([0.0, 94.0, 62.0, 56.0, 54.0, 40.0, 40.0])[number][:, None]
    return centers[..., 0], centers[..., 1], _uniform((n, MOST_ANIMALS), low, high, g)


def _props(
    table: dict[str, tuple[tuple[str, int, int], ...]], background: Tensor, slots: int, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Choose props for the place of each scene: indices into `_PROPS` and sizes in pixels, (B, slots) each."""
    longest = max(len(props) for props in table.values())
    # (8, longest, 3): prop, minimum and maximum size; shorter lists repeat, and only their first part is used.
    grid = torch.tensor(
        [[(_PROPS.index(p[0]), p[1], p[2]) for p in (table[place] * longest)[:longest]] for place in BACKGROUNDS]
    )
    lengths = torch.tensor([len(table[place]) for place in BACKGROUNDS])[background][:, None]
    # Neighboring slots get different props, so that a sky has one sun.
    pick = (
        (torch.rand(len(background), 1, generator=g) * lengths).long() + torch.arange(slots) * _stride(lengths, g)
    ) % lengths
    chosen = grid[background[:, None], pick]
    return chosen[..., 0], _uniform(pick.shape, chosen[..., 1].float(), chosen[..., 2].float(), g)


def _stride(lengths: Tensor, g: torch.Generator) -> Tensor:
    """Return random steps, 1 to length - 1, through a table of props."""
    return 1 + (torch.rand(lengths.shape, generator=g) * (lengths - 1)).long()


def sample_layouts(
    n: int,
    seed: int,
    *,
    split: str = "train",
    species: Tensor | None = None,
    number: Tensor | None = None,
    style: Tensor | None = None,
    background: Tensor | None = None,
) -> Layout:
    """Sample the layouts of `n` scenes.

    Args:
        n: number of scenes.
        seed: the same seed gives the same layouts.
        split: combinations of the four attributes to sample from: `train` (90%), `heldout` (the rest) or `all`.
        species, number, style, background: (n,) integer tensors that set an attribute; the combinations are then no
            longer those of `split`. `number` can be 0 to 6.

    Raises:
        ValueError: `split` is unknown.
    """
    g = torch.Generator().manual_seed(seed)
    if split not in ("train", "heldout", "all"):
        raise ValueError(f"split is {split!r}; it must be 'train', 'heldout' or 'all'.")
    held = heldout_combinations()
    # (combinations, 4): species, style, number - 1, background.
    allowed = {"train": ~held, "heldout": held, "all": torch.ones_like(held)}[split].nonzero()
    chosen = allowed[torch.randint(len(allowed), (n,), generator=g)]
    species = chosen[:, 0] if species is None else species
    style = chosen[:, 1] if style is None else style
    number = chosen[:, 2] + 1 if number is None else number
    background = chosen[:, 3] if background is None else background
    art = load_artwork()

    # Scenes vary from empty to crowded, so that a model can generate both and everything in between.
    fullness = torch.rand(n, generator=g)

    sky, sky_size = _props(_SKY, background, _SKY_SLOTS, g)
    sky_x, sky_y = _uniform(sky.shape, 6, 122, g), _uniform(sky.shape, 8, 30, g)
    ground, ground_size = _props(_GROUND, background, _GROUND_SLOTS, g)
    # Objects stand on the ground: `base` is their lower edge. Large ones move toward the horizon.
    base = _uniform(ground.shape, 56, 116, g)
    base = torch.where(ground_size > 34, 56 + (base - 56) * 0.35, base)
    ground_x, ground_y = _uniform(ground.shape, 4, 124, g), base - ground_size / 2
    front, _ = _props(_GROUND, background, _FRONT_SLOTS, g)
    front_size = _uniform(front.shape, 16, 22, g)
    front_x, front_y = _uniform(front.shape, 6, 122, g), _uniform(front.shape, 114, 122, g)

    x, y, size = _cells(number, g)
    absent = torch.arange(MOST_ANIMALS)[None] >= number[:, None]
    animals = art.animal[species, style][:, None].expand(n, MOST_ANIMALS).masked_fill(absent, -1)
    props = art.prop[torch.cat([sky, ground, front], 1), style[:, None]]
    kept = torch.rand(props.shape, generator=g) < fullness[:, None]
    props = props.masked_fill(~kept, -1)

    half = size / 2
    boxes = torch.stack([x - half, y - half, x + half, y + half], -1).clamp(0, SIZE).masked_fill(absent[..., None], 0)
    # Back to front: sky, props on the ground by their lower edge, animals in front of all props, and last the small
    # objects at the bottom of the image.
    depth = torch.cat([torch.full(sky.shape, -1000.0), base, torch.full(front.shape, 2000.0), 500 + y + half], 1)
    order = depth.argsort(1)
    everything = {
        "sprite": torch.cat([props, animals], 1),
        "x": torch.cat([sky_x, ground_x, front_x, x], 1),
        "y": torch.cat([sky_y, ground_y, front_y, y], 1),
        "size": torch.cat([sky_size, ground_size, front_size, size], 1),
    }
    sorted_objects = {name: value.gather(1, order) for name, value in everything.items()}
    return Layout(
        species=species,
        style=style,
        background=background,
        number=number,
        window=torch.randint(32, (n,), generator=g),
        richness=(fullness * 0.6 + 0.5 * torch.rand(n, generator=g)).clamp(0, 1),
        shade=1 + _uniform((n, 1, 3, 3), -0.09, 0.09, g) + _uniform((n, 3, 1, 1), -0.035, 0.035, g),
        flip=torch.rand(depth.shape, generator=g) < 0.5,
        boxes=boxes,
        **sorted_objects,
    )


def render_layouts(layout: Layout, device: str = "cpu") -> Tensor:
    """Render layouts to images (B, 3, 128, 128), float32 in [0, 1], on `device`."""
    art = load_artwork(device)
    b = len(layout)
    place = layout.background.to(device)
    # Background: a 128-pixel window of the panorama, which is periodic in x; texture is the difference to `plain`.
    columns = (layout.window[:, None] * 8 + torch.arange(SIZE)[None]) % art.panoramas.shape[-1]
    pick = columns.to(device)[:, None, None, :].expand(b, 3, SIZE, SIZE)
    plain = art.plain[place].gather(3, pick)
    image = plain + layout.richness.to(device)[:, None, None, None] * (art.panoramas[place].gather(3, pick) - plain)
    shade = F.interpolate(layout.shade.to(device), size=(SIZE, SIZE), mode="bicubic", align_corners=True)
    image = (image * shade).clamp(0, 1)

    # Level of detail: the lowest resolution that is at least the size of the object.
    level = (layout.size[..., None] <= torch.tensor(_LEVELS[1:])).sum(-1)
    sprite = layout.sprite + level * art.count
    pixel = torch.arange(SIZE, device=device) + 0.5
    for k in range(layout.sprite.shape[1]):
        rows = (layout.sprite[:, k] >= 0).nonzero()[:, 0]  # scenes with an object in slot k
        if len(rows) == 0:
            continue
        x, y, half = (v[rows, k].to(device)[:, None] for v in (layout.x, layout.y, layout.size / 2))
        sign = torch.where(layout.flip[rows, k], -1.0, 1.0).to(device)[:, None]
        # Sampling grid in [-1, 1] within the sprite; outside it, grid_sample returns transparent zeros.
        u = (sign * (pixel[None] - x) / half)[:, None, :].expand(-1, SIZE, -1)
        v = ((pixel[None] - y) / half)[:, :, None].expand(-1, -1, SIZE)
        stamp = F.grid_sample(
            art.sprites[sprite[rows, k].to(device)].float() / 255, torch.stack([u, v], -1), align_corners=False
        )
        rows = rows.to(device)
        image[rows] = image[rows] * (1 - stamp[:, 3:]) + stamp[:, :3]  # alpha compositing, premultiplied
    return image.clamp(0, 1)


def render_scenes(
    n: int,
    seed: int,
    *,
    split: str = "train",
    device: str = "cpu",
    species: Tensor | None = None,
    number: Tensor | None = None,
    style: Tensor | None = None,
    background: Tensor | None = None,
) -> Scenes:
    """Sample layouts and render them; see `sample_layouts` for the arguments."""
    layout = sample_layouts(n, seed, split=split, species=species, number=number, style=style, background=background)
    return Scenes(render_layouts(layout, device), layout)


def stream_scenes(
    n: int, seed: int, *, chunk: int = 256, split: str = "train", device: str = "cpu"
) -> Iterator[Scenes]:
    """Render `n` scenes in chunks with a seed per chunk, for data sets larger than memory."""
    for i, start in enumerate(range(0, n, chunk)):
        yield render_scenes(min(chunk, n - start), seed * 1_000_003 + i, split=split, device=device)
