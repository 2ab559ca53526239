"""Small line plots drawn with Pillow: enough for curves of a dozen points, and nothing more to install."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 420, 300, 74, 26, 34, 48
_INK, _PAPER, _FAINT, _GRID, _LINE = (30, 30, 30), (255, 255, 255), (110, 110, 110), (228, 228, 228), (31, 99, 180)


@dataclass(frozen=True)
class Panel:
    """One plot: points joined in their order.

    Attributes:
        title: what goes up.
        across: what goes across.
        x: values across.
        y: values up.
        bars: (low, high) of a bar at each point, or None for none.
        names: written beside each point.
    """

    title: str
    across: str
    x: Sequence[float]
    y: Sequence[float]
    bars: Sequence[tuple[float, float] | None]
    names: Sequence[str]


def draw(panels: Sequence[Panel], columns: int = 3) -> Image.Image:
    """Draw panels in rows."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    sheet = Image.new("RGB", (columns * _WIDTH, rows * _HEIGHT), _PAPER)
    for number, panel in enumerate(panels):
        sheet.paste(_panel(panel), ((number % columns) * _WIDTH, (number // columns) * _HEIGHT))
    return sheet


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers within [low, high], at most `most` and at least two where they differ."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10, 20) if (high - low) / (m * power) <= most)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _panel(panel: Panel) -> Image.Image:
    picture = Image.new("RGB", (_WIDTH, _HEIGHT), _PAPER)
    pen = ImageDraw.Draw(picture)
    font, small = ImageFont.load_default(14), ImageFont.load_default(11)
    x_low, x_high = _range(panel.x)
    y_low, y_high = _range([*panel.y, *(end for bar in panel.bars if bar for end in bar)])

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM),
        )

    for value in ticks(y_low, y_high):
        _, row = place(x_low, value)
        pen.line([(_LEFT, row), (_WIDTH - _RIGHT, row)], fill=_GRID)
        pen.text((_LEFT - 6, row), f"{value:.4g}", fill=_FAINT, font=small, anchor="rm")
    for value in ticks(x_low, x_high):
        column, _ = place(value, y_low)
        pen.line([(column, _TOP), (column, _HEIGHT - _BOTTOM)], fill=_GRID)
        pen.text((column, _HEIGHT - _BOTTOM + 5), f"{value:.3g}", fill=_FAINT, font=small, anchor="mt")
    pen.text((_LEFT, 8), panel.title, fill=_INK, font=font)
    pen.text(((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 20), panel.across, fill=_FAINT, font=small, anchor="mt")
    spots = [place(x, y) for x, y in zip(panel.x, panel.y, strict=True)]
    for spot, bar in zip(spots, panel.bars, strict=True):
        if bar is not None:
            pen.line([(spot[0], place(x_low, bar[0])[1]), (spot[0], place(x_low, bar[1])[1])], fill=_FAINT)
    if len(spots) > 1:
        pen.line(spots, fill=_LINE, width=2)
    for (column, row), name in zip(spots, panel.names, strict=True):
        pen.ellipse([column - 3, row - 3, column + 3, row + 3], fill=_LINE)
        pen.text((column + 5, row - 5), name, fill=_INK, font=small, anchor="ls")
    return picture


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the values' range with a margin; never empty."""
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or max(abs(low) * 0.05, 1e-6)
    return low - margin, high + margin
