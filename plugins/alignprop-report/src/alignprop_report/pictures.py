"""Pictures of a run, cut from its sheets, small enough to travel inside a page."""

from __future__ import annotations

import base64
import io
import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, features

from alignprop_report.markup import Markup, element
from alignprop_report.read import mapping, mappings, number

CELLS = "alignprop"
"""Under this key a sheet's PNG says where its pictures are, and what stands below each."""

BUDGET = 1_700_000
"""Bytes of pictures a page holds at most; as text in the page they take a third more."""

_LEVELS = ((320, 80), (256, 75), (192, 70), (128, 60), (96, 45))
_LARGEST = 120_000_000
"""Pixels of a sheet that is still opened; reading more would take longer than a report may."""


@dataclass(frozen=True)
class Cell:
    """Pictures that belong together on a sheet: one prompt's, one for each head (base and tuned, say).

    Attributes:
        pictures: head -> picture; the only head of a preview is "".
        lines: the prompt, and what else stands below.
    """

    pictures: dict[str, Image.Image]
    lines: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The prompt."""
        return self.lines[0] if self.lines else ""


@dataclass(frozen=True)
class Sheet:
    """A sheet of pictures.

    Attributes:
        whole: all of it.
        cells: what it says of its pictures; empty for sheets that say nothing.
    """

    whole: Image.Image
    cells: tuple[Cell, ...]


def previews(folder: Path) -> dict[int, Path]:
    """Return the sheets along the way by their step."""
    found = {path: re.fullmatch(r"step-(\d{1,12})\.png", path.name) for path in (folder / "images").glob("step-*.png")}
    return dict(sorted((int(name[1]), path) for path, name in found.items() if name))


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most `most` of the items, evenly spread, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def open_sheet(path: Path, problems: list[str]) -> Sheet | None:
    """Read a sheet; None, and a word in `problems`, where it is no picture that can be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # this has its own limit
            with Image.open(path) as image:
                if image.width * image.height > _LARGEST:
                    problems.append(f"images/{path.name} is too large for this page and is left out.")
                    return None
                said = image.info.get(CELLS)
                image.load()
                whole = image.convert("RGB")
                said = image.info.get(CELLS, said)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        problems.append(f"images/{path.name} cannot be read and is left out: {error}.")
        return None
    return Sheet(whole, _cells(whole, said))


class Album:
    """Pictures on their way into a page; they become data URIs together, in a size at which all of them fit.

    `add` gives back a function that makes the element once `fit` has been called.
    """

    def __init__(self) -> None:
        self._pictures: list[tuple[Image.Image, int]] = []
        self._level = 0
        self._left = BUDGET
        self.left_out = 0
        self._format = "WEBP" if features.check("webp") else "PNG"

    def add(self, picture: Image.Image, alt: str, *, larger: int = 1) -> Callable[[], Markup]:
        """Take a picture in, `larger` times as wide as others may be; returns what makes its element."""
        self._pictures.append((picture, larger))
        return lambda: self._element(picture, alt, larger)

    def fit(self) -> None:
        """Choose the size from a sample of the pictures."""
        sample = spread(self._pictures, 6)
        for level in range(len(_LEVELS)):
            self._level = level
            if not sample:
                break
            size = sum(len(self._encode(*entry)) for entry in sample) / len(sample) * len(self._pictures)
            if size <= 0.85 * BUDGET:
                break

    def _element(self, picture: Image.Image, alt: str, larger: int) -> Markup:
        data = self._encode(picture, larger)
        if len(data) > self._left:
            self.left_out += 1
            return element("span", f"Left out, the page would be too large: {alt}", class_="gone")
        self._left -= len(data)
        uri = f"data:image/{self._format.lower()};base64,{base64.b64encode(data).decode('ascii')}"
        return element("img", src=uri, alt=alt, width=picture.width, height=picture.height)

    def _encode(self, picture: Image.Image, larger: int) -> bytes:
        side, quality = _LEVELS[self._level]
        buffer = io.BytesIO()
        shown = picture.copy()
        shown.thumbnail((side * larger, side * larger), Image.Resampling.LANCZOS, reducing_gap=2.0)
        shown.save(buffer, self._format, quality=quality, method=2)
        return buffer.getvalue()


def _cells(whole: Image.Image, said: object) -> tuple[Cell, ...]:
    """Cut out what the sheet says of itself; nothing where that makes no sense."""
    if not isinstance(said, str):
        return ()
    try:
        told = mapping(json.loads(said))
    except (ValueError, RecursionError):
        return ()
    heads = [str(head) for head in told["heads"]] if isinstance(told.get("heads"), list) else []
    cells = []
    for entry in mappings(told.get("cells")):
        boxes = entry.get("boxes")
        lines = entry.get("lines")
        if not isinstance(boxes, list) or not isinstance(lines, list):
            return ()
        names = heads or [""]
        if len(boxes) != len(names):
            return ()
        pictures = {}
        for name, box in zip(names, boxes, strict=True):
            area = _area(box, whole)
            if area is None:
                return ()
            pictures[name] = whole.crop(area)
        cells.append(Cell(pictures, tuple(str(line) for line in lines)))
    return tuple(cells)


def _area(box: object, whole: Image.Image) -> tuple[int, int, int, int] | None:
    """Return left, top, right and bottom of a box inside the sheet; None for anything else."""
    if not isinstance(box, list) or len(box) != 4:
        return None
    sides = [number(side) for side in box]
    if any(side is None for side in sides):
        return None
    left, top, right, bottom = (int(side) for side in sides if side is not None)
    inside = 0 <= left < right <= whole.width and 0 <= top < bottom <= whole.height
    return (left, top, right, bottom) if inside else None
