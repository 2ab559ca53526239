"""Images of a run, cropped from its sheets and compressed to fit in a page."""

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
from alignprop_report.run_files import mapping, mappings, number

CELLS = "alignprop"
"""PNG text key of a sheet's layout: where its images are, and the text below each, as JSON."""

BUDGET = 1_700_000
"""Maximum bytes of images in a page; base64 makes them a third larger."""

_LEVELS = ((320, 80), (256, 75), (192, 70), (128, 60), (96, 45))
_LARGEST = 120_000_000
"""Maximum pixels of a sheet; larger ones would take too long to read."""


@dataclass(frozen=True)
class Cell:
    """Images of one prompt on a sheet, one for each head (such as base and tuned).

    Attributes:
        images: head -> image; the only head of a preview is "".
        lines: the prompt, then further lines of text.
    """

    images: dict[str, Image.Image]
    lines: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The prompt."""
        return self.lines[0] if self.lines else ""


@dataclass(frozen=True)
class Sheet:
    """A sheet of images.

    Attributes:
        whole: the complete sheet.
        cells: its images by prompt; empty for a sheet without a layout.
    """

    whole: Image.Image
    cells: tuple[Cell, ...]


def previews(folder: Path) -> dict[int, Path]:
    """Return the preview sheets by step."""
    found = {path: re.fullmatch(r"step-(\d{1,12})\.png", path.name) for path in (folder / "images").glob("step-*.png")}
    return dict(sorted((int(name[1]), path) for path, name in found.items() if name))


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most `most` of the items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def open_sheet(path: Path, problems: list[str]) -> Sheet | None:
    """Read a sheet; if that fails, return None and add a sentence to `problems`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # _LARGEST is the limit here
            with Image.open(path) as image:
                if image.width * image.height > _LARGEST:
                    problems.append(f"images/{path.name} is too large for this page and is skipped.")
                    return None
                text = image.info.get(CELLS)
                image.load()
                whole = image.convert("RGB")
                text = image.info.get(CELLS, text)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        problems.append(f"images/{path.name} cannot be read and is skipped: {error}.")
        return None
    return Sheet(whole, _cells(whole, text))


class Album:
    """Images of a page as data URIs, at the largest size at which all of them fit.

    `add` returns a function that builds the element; call it after `fit`.
    """

    def __init__(self) -> None:
        self._images: list[tuple[Image.Image, int]] = []
        self._level = 0
        self._left = BUDGET
        self.left_out = 0
        self._format = "WEBP" if features.check("webp") else "PNG"

    def add(self, image: Image.Image, alt: str, *, larger: int = 1) -> Callable[[], Markup]:
        """Add an image, up to `larger` times as wide as others; return the function that builds its element."""
        self._images.append((image, larger))
        return lambda: self._element(image, alt, larger)

    def fit(self) -> None:
        """Choose the size from a sample of the images."""
        sample = spread(self._images, 6)
        for level in range(len(_LEVELS)):
            self._level = level
            if not sample:
                break
            size = sum(len(self._encode(*entry)) for entry in sample) / len(sample) * len(self._images)
            if size <= 0.85 * BUDGET:
                break

    def _element(self, image: Image.Image, alt: str, larger: int) -> Markup:
        data = self._encode(image, larger)
        if len(data) > self._left:
            self.left_out += 1
            return element("span", f"Not shown, because the page would be too large: {alt}", class_="gone")
        self._left -= len(data)
        uri = f"data:image/{self._format.lower()};base64,{base64.b64encode(data).decode('ascii')}"
        return element("img", src=uri, alt=alt, width=image.width, height=image.height)

    def _encode(self, image: Image.Image, larger: int) -> bytes:
        side, quality = _LEVELS[self._level]
        buffer = io.BytesIO()
        shown = image.copy()
        shown.thumbnail((side * larger, side * larger), Image.Resampling.LANCZOS, reducing_gap=2.0)
        shown.save(buffer, self._format, quality=quality, method=2)
        return buffer.getvalue()


def _cells(whole: Image.Image, text: object) -> tuple[Cell, ...]:
    """Crop the images that the layout describes; none if it is invalid."""
    if not isinstance(text, str):
        return ()
    try:
        layout = mapping(json.loads(text))
    except (ValueError, RecursionError):
        return ()
    heads = [str(head) for head in layout["heads"]] if isinstance(layout.get("heads"), list) else []
    cells = []
    for entry in mappings(layout.get("cells")):
        boxes = entry.get("boxes")
        lines = entry.get("lines")
        if not isinstance(boxes, list) or not isinstance(lines, list):
            return ()
        names = heads or [""]
        if len(boxes) != len(names):
            return ()
        images = {}
        for name, box in zip(names, boxes, strict=True):
            area = _area(box, whole)
            if area is None:
                return ()
            images[name] = whole.crop(area)
        cells.append(Cell(images, tuple(str(line) for line in lines)))
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
