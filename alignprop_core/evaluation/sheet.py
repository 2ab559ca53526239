"""Image sheets: preview grids and before/after comparisons."""

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
"""PNG text key of a sheet's layout: boxes of its images and the lines of text below them, as JSON."""

_GAP, _LINE = 10, 16
_INK, _PAPER, _FAINT = (30, 30, 30), (255, 255, 255), (110, 110, 110)
_SMALLEST = 192
"""Images narrower than this many pixels are enlarged by an integer factor."""


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image atomically; the format follows the file's suffix."""
    buffer = io.BytesIO()
    info = PngInfo()
    if CELLS in image.info:
        info.add_itxt(CELLS, image.info[CELLS])
    image.save(buffer, format={".jpg": "JPEG", ".webp": "WEBP"}.get(path.suffix, "PNG"), pnginfo=info)
    write_atomic(path, buffer.getvalue())


def _enlarged(image: Tensor) -> Image.Image:
    small = to_pil(image)
    factor = max(1, -(-_SMALLEST // small.width))
    return small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)


def _fitted(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return the text, shortened with three dots if it is wider than `width` pixels."""
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
    """Return a sheet of images, (3, H, W) uint8 or floating point in [0, 1], in rows, each with its caption below."""
    cells = [([_enlarged(image)], [caption]) for image, caption in zip(images, captions, strict=True)]
    return _table(cells, columns)


def before_after(comparison: Comparison, columns: int = 3) -> Image.Image:
    """Return a sheet with the first image of each prompt, all variants side by side, and its scores below."""
    per = comparison.config.images_per_prompt
    cells = []
    for number, prompt in enumerate(comparison.prompts.prompts):
        images = [_enlarged(variant.images[number]) for variant in comparison.variants.values()]
        lines = [prompt]
        for label in next(iter(comparison.variants.values())).scores:
            values = [variant.scores[label][number * per] for variant in comparison.variants.values()]
            lines.append(f"{label}: " + " to ".join(_short(value) for value in values))
        cells.append((images, lines))
    return _table(cells, columns, heads=list(comparison.variants))


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _table(
    cells: Sequence[tuple[Sequence[Image.Image], Sequence[str]]], columns: int, heads: Sequence[str] = ()
) -> Image.Image:
    """Lay out cells of images side by side with lines of text below; the sheet's `info` contains the layout."""
    font = ImageFont.load_default(13)
    columns = min(columns, len(cells))
    images, lines = cells[0]
    side, tall = images[0].size
    cell_width = len(images) * side + (len(images) - 1) * 4
    cell_height = tall + len(lines) * _LINE + _GAP // 2
    top = _GAP + (_LINE if heads else 0)
    rows = math.ceil(len(cells) / columns)
    sheet = Image.new("RGB", (_GAP + columns * (cell_width + _GAP), top + rows * (cell_height + _GAP)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    layout = []
    for number, (images, lines) in enumerate(cells):
        x = _GAP + (number % columns) * (cell_width + _GAP)
        y = top + (number // columns) * (cell_height + _GAP)
        boxes = []
        for place, image in enumerate(images):
            left = x + place * (side + 4)
            sheet.paste(image, (left, y))
            boxes.append([left, y, left + image.width, y + image.height])
            if heads and number < columns:
                draw.text((left, _GAP // 2), heads[place], fill=_FAINT, font=font)
        for row, line in enumerate(lines):
            ink = _INK if row == 0 else _FAINT
            draw.text((x, y + tall + 3 + row * _LINE), _fitted(line, cell_width, font), fill=ink, font=font)
        layout.append({"boxes": boxes, "lines": list(lines)})
    sheet.info[CELLS] = json.dumps({"heads": list(heads), "cells": layout})
    return sheet
