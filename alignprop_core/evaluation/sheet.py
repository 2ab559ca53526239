"""Pictures for people: preview grids and before/after sheets."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from alignprop_core._files import write_atomic
from alignprop_core.evaluation.compare import Comparison
from alignprop_core.images import to_pil

CELLS = "alignprop"
"""PNG text key of a sheet's layout: where its images are, and the text below each, as JSON."""

_GAP, _LINE = 10, 16
_INK, _PAPER, _FAINT = (30, 30, 30), (255, 255, 255), (110, 110, 110)
_SMALLEST = 192
"""Pictures narrower than this are enlarged by a whole factor, so that a small model's pictures can be looked at."""


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image atomically; the format follows the file's suffix."""
    buffer = io.BytesIO()
    info = PngInfo()
    if CELLS in image.info:
        info.add_itxt(CELLS, image.info[CELLS])
    image.save(buffer, format={".jpg": "JPEG", ".webp": "WEBP"}.get(path.suffix, "PNG"), pnginfo=info)
    write_atomic(path, buffer.getvalue())


def _enlarged(image: Tensor) -> Image.Image:
    picture = to_pil(image)
    factor = max(1, -(-_SMALLEST // picture.width))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _fitted(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return the text, cut with three dots where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Return images of one height in a row, left to right."""
    sheet = Image.new("RGB", (sum(image.width for image in images), images[0].height), _PAPER)
    x = 0
    for image in images:
        sheet.paste(image, (x, 0))
        x += image.width
    return sheet


def grid(images: Sequence[Tensor], captions: Sequence[str], columns: int = 4) -> Image.Image:
    """Draw images in rows, each with its caption below."""
    pictures = [_enlarged(image) for image in images]
    return _table([([picture], [caption]) for picture, caption in zip(pictures, captions, strict=True)], columns)


def before_after(comparison: Comparison, columns: int = 3) -> Image.Image:
    """Draw the first image of each prompt for every variant side by side, with its scores below."""
    per = comparison.config.images_per_prompt
    cells = []
    for number, prompt in enumerate(comparison.prompts.prompts):
        pictures, lines = [], [prompt]
        for variant in comparison.variants.values():
            pictures.append(_enlarged(variant.images[number]))
        for label in next(iter(comparison.variants.values())).scores:
            values = [variant.scores[label][number * per] for variant in comparison.variants.values()]
            lines.append(f"{label}: " + " to ".join(_figure(value) for value in values))
        cells.append((pictures, lines))
    return _table(cells, columns, heads=list(comparison.variants))


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _table(
    cells: Sequence[tuple[Sequence[Image.Image], Sequence[str]]], columns: int, heads: Sequence[str] = ()
) -> Image.Image:
    """Lay out cells of pictures side by side with lines of text below; the sheet's `info` says where they are."""
    font = ImageFont.load_default(13)
    columns = min(columns, len(cells))
    pictures, lines = cells[0]
    side, tall = pictures[0].size
    cell_width = len(pictures) * side + (len(pictures) - 1) * 4
    cell_height = tall + len(lines) * _LINE + _GAP // 2
    top = _GAP + (_LINE if heads else 0)
    rows = math.ceil(len(cells) / columns)
    sheet = Image.new("RGB", (_GAP + columns * (cell_width + _GAP), top + rows * (cell_height + _GAP)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    told = []
    for number, (pictures, lines) in enumerate(cells):
        x = _GAP + (number % columns) * (cell_width + _GAP)
        y = top + (number // columns) * (cell_height + _GAP)
        boxes = []
        for place, picture in enumerate(pictures):
            left = x + place * (side + 4)
            sheet.paste(picture, (left, y))
            boxes.append([left, y, left + picture.width, y + picture.height])
            if heads and number < columns:
                draw.text((left, _GAP // 2), heads[place], fill=_FAINT, font=font)
        for row, line in enumerate(lines):
            ink = _INK if row == 0 else _FAINT
            draw.text((x, y + tall + 3 + row * _LINE), _fitted(line, cell_width, font), fill=ink, font=font)
        told.append({"boxes": boxes, "lines": list(lines)})
    sheet.info[CELLS] = json.dumps({"heads": list(heads), "cells": told})
    return sheet
