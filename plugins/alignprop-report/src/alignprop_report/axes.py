"""The axes of a chart: positions of points, ticks, and how numbers are written."""

from __future__ import annotations

import math
from dataclasses import dataclass

from alignprop_report.markup import Markup, element, joined

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 210, 52, 12, 10, 34

Point = tuple[float, float]


@dataclass(frozen=True)
class Axes:
    """The ranges of a chart's axes, and whether the vertical axis is logarithmic."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool

    def place(self, x: float, y: float) -> Point:
        """Return the position of a point in the drawing."""
        low, high = self.y
        if self.log:
            y, low, high = math.log10(y), math.log10(low), math.log10(high)
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def figure(value: float) -> str:
    """Return a readable number: 0.2593, 6,231, 1.2e-05."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def grid(axes: Axes, across: str) -> Markup:
    """Return the grid lines and numbers of both axes, and the name of the horizontal one."""
    rows, columns = [], []
    for value in _log_ticks(*axes.y) if axes.log else ticks(*axes.y):
        _, y = axes.place(axes.x[0], value)
        rows.append(element("path", d=f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}", class_="grid"))
        rows.append(element("text", figure(value), x=LEFT - 6, y=f"{y + 3.5:.1f}", class_="end"))
    for value in ticks(*axes.x, 6):
        if across == "step" and value != int(value):
            continue
        x, _ = axes.place(value, axes.y[1])
        columns.append(element("path", d=f"M{x:.1f} {TOP}V{HEIGHT - BOTTOM}", class_="grid"))
        columns.append(element("text", figure(value), x=f"{x:.1f}", y=HEIGHT - BOTTOM + 14, class_="middle"))
    name = element("text", across, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 5, class_="middle")
    return joined(rows, columns, name)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers within [low, high], at most `most` and at least two where they differ."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10, 20) if (high - low) / (m * power) <= most)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers on a logarithmic axis: powers of ten, or 1, 2 and 5 times them where those are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((last - first) / 6))
    powers = [10.0**n for n in range(first, last + 1, stride)]
    inside = [value for value in powers if low <= value <= high]
    if len(inside) >= 3:
        return inside
    fine = [m * 10.0**n for n in range(first, last + 1) for m in (1, 2, 5)]
    return [value for value in fine if low <= value <= high] or [low, high]
