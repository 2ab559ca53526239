"""Line charts as inline SVG: they use the page's colors and width, and have a description for screen readers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from alignprop_report.axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axes, figure, grid
from alignprop_report.markup import Markup, element, joined

BUCKETS = 200
"""Maximum points of a line: more steps are averaged, and a band shows their range."""
COLORS = 8
_TREND = 20
"""A line of at least this many points gets a running mean, over a twentieth of its points to either side."""


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: what it is called in the legend.
        x: horizontal values, ascending.
        y: vertical values, None where there is none.
        color: number of its color, the same for one thing in every chart; None is the color of the text.
        style: "steps" is noisy: points thin, with their range, and a running mean; "trend" is the running mean alone;
            "dots" joins points worth looking at one by one.
        best: the x of a point to mark as the best.
        bars: ends of a bar at each point, or None; for dots.
        names: what to write at each point; for dots.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    color: int | None = 0
    style: Literal["steps", "trend", "dots"] = "steps"
    best: float | None = None
    bars: Sequence[tuple[float, float] | None] = ()
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Mark:
    """An event at a step: a mark at the bottom of a chart, or a vertical line (`saved`)."""

    x: float
    kind: Literal["skipped", "idle", "saved"]
    why: str


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        title: name of the vertical axis.
        lines: what is drawn.
        note: a remark below the title.
        log: whether the axis is logarithmic; values of zero and below are left out then.
        within: values the axis must reach, such as 0 and 1 for shares.
        limits: (value, name) of horizontal lines.
        marks: events at steps.
        across: name of the horizontal axis.
    """

    title: str
    lines: Sequence[Line]
    note: str = ""
    log: bool = False
    within: Sequence[float] = ()
    limits: Sequence[tuple[float, str]] = ()
    marks: Sequence[Mark] = ()
    across: str = "step"


@dataclass(frozen=True)
class _Bucket:
    x: float
    y: float
    low: float
    high: float


def draw(chart: Chart) -> Markup | None:
    """Return a chart with its title and legend; None if it has no points."""
    lines = [(line, runs) for line in chart.lines if any(runs := _buckets(line, log=chart.log))]
    if not lines:
        return None
    axes = _axes(chart, [bucket for _, runs in lines for run in runs for bucket in run])
    inside = joined(
        grid(axes, chart.across),
        [_limit(axes, value, name) for value, name in chart.limits if _shows(axes, value)],
        _marks(axes, chart.marks),
        [_line(axes, line, runs) for line, runs in lines],
    )
    words = "; ".join(_description(line, runs, chart.across) for line, runs in lines)
    svg = element("svg", inside, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{chart.title}. {words}.")
    note = element("p", chart.note, class_="note") if chart.note else None
    return element("figure", element("figcaption", chart.title), note, _legend(chart, lines), svg, class_="chart")


def _buckets(line: Line, *, log: bool) -> list[list[_Bucket]]:
    """Join a line's points to at most `BUCKETS`, in runs that a missing value ends."""
    size = max(1, math.ceil(len(line.x) / BUCKETS))
    runs: list[list[_Bucket]] = [[]]
    for start in range(0, len(line.x), size):
        known = [
            (x, y)
            for x, y in zip(line.x[start : start + size], line.y[start : start + size], strict=True)
            if y is not None and (y > 0 or not log)
        ]
        if not known:
            runs.append([])
            continue
        values = [y for _, y in known]
        middle = math.fsum(values) / len(values)
        ends = [end for bar in line.bars[start : start + size] if bar for end in bar]
        across = math.fsum(x for x, _ in known) / len(known)
        runs[-1].append(_Bucket(across, middle, min([*values, *ends]), max([*values, *ends])))
    return [run for run in runs if run]


def _axes(chart: Chart, buckets: Sequence[_Bucket]) -> Axes:
    x_low, x_high = min(b.x for b in buckets), max(b.x for b in buckets)
    x_low, x_high = min([x_low, *(m.x for m in chart.marks)]), max([x_high, *(m.x for m in chart.marks)])
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    thin = all(line.style == "trend" for line in chart.lines)
    lows, highs = ([b.y for b in buckets],) * 2 if thin else ([b.low for b in buckets], [b.high for b in buckets])
    low, high = min([*lows, *chart.within]), max([*highs, *chart.within])
    # A limit far away would flatten the line it is a limit for.
    near = [value for value, _ in chart.limits if value <= high + (high - low) and value >= low - (high - low)]
    low, high = min([low, *near]), max([high, *near])
    if chart.log:
        return Axes((x_low, x_high), (low / 1.15, high * 1.15), True)
    margin = 0.05 * (high - low) or max(0.05 * abs(low), 1e-6)
    return Axes((x_low, x_high), (low - margin, high + margin), False)


def _css(line: Line) -> str:
    """Return the classes of a line's color; beyond the last color they begin again, dashed."""
    if line.color is None:
        return "ink"
    return f"c{line.color % COLORS}" + (" second" if line.color // COLORS % 2 else "")


def _shows(axes: Axes, value: float) -> bool:
    return axes.y[0] <= value <= axes.y[1]


def _limit(axes: Axes, value: float, name: str) -> Markup:
    _, y = axes.place(axes.x[0], value)
    return joined(
        element(
            "path", element("title", f"{name}: {figure(value)}"), d=f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}", class_="limit"
        ),
        element("text", name, x=WIDTH - RIGHT - 4, y=f"{y - 4:.1f}", class_="end"),
    )


def _marks(axes: Axes, marks: Sequence[Mark]) -> Markup:
    drawn: dict[tuple[str, int], Markup] = {}  # one mark per pixel and kind
    foot = HEIGHT - BOTTOM
    for mark in marks:
        x = LEFT + (mark.x - axes.x[0]) / (axes.x[1] - axes.x[0]) * (WIDTH - LEFT - RIGHT)
        place = (mark.kind, round(x))
        if place in drawn:
            continue
        shape = {
            "skipped": f"M{x - 4:.1f} {foot}h8l-4 -8z",
            "idle": f"M{x:.1f} {foot}v-7",
            "saved": f"M{x:.1f} {TOP}V{foot}",
        }[mark.kind]
        title = element("title", f"step {mark.x:.0f}: {mark.why}")
        drawn[place] = element("path", title, d=shape, class_=mark.kind)
    return joined(drawn.values())


def _line(axes: Axes, line: Line, runs: Sequence[Sequence[_Bucket]]) -> Markup:
    css = _css(line)
    if line.style == "dots":
        return joined(_path(axes, runs, f"{css} thick"), _dots(axes, line, css))
    count = sum(map(len, runs))
    trend = [_running_mean(run, count // _TREND) for run in runs] if count >= _TREND else runs
    if line.style == "trend" or count < _TREND:
        return _path(axes, trend, f"{css} thick")
    band = None
    if any(bucket.low < bucket.high for run in runs for bucket in run):
        band = element("path", d=" ".join(_outline(axes, run) for run in runs), class_=f"{css} band")
    return joined(band, _path(axes, runs, f"{css} thin"), _path(axes, trend, f"{css} thick"))


def _path(axes: Axes, runs: Sequence[Sequence[_Bucket]], css: str) -> Markup:
    parts = []
    for run in runs:
        spots = [f"{x:.1f} {y:.1f}" for x, y in (axes.place(bucket.x, bucket.y) for bucket in run)]
        # A run of one point would be nothing to see without a stroke of its own.
        parts.append(f"M{'L'.join(spots)}" + ("h.1" if len(spots) == 1 else ""))
    return element("path", d="".join(parts), class_=f"line {css}")


def _outline(axes: Axes, run: Sequence[_Bucket]) -> str:
    above = [axes.place(bucket.x, bucket.high) for bucket in run]
    below = [axes.place(bucket.x, bucket.low) for bucket in reversed(run)]
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in [*above, *below]) + "z"


def _running_mean(run: Sequence[_Bucket], reach: int) -> list[_Bucket]:
    """Return means over `reach` points to either side, fewer near the ends, always as many on both sides."""
    result = []
    for i, bucket in enumerate(run):
        near = min(reach, i, len(run) - 1 - i)
        values = [other.y for other in run[i - near : i + near + 1]]
        mean = math.fsum(values) / len(values)
        result.append(_Bucket(bucket.x, mean, mean, mean))
    return result


def _dots(axes: Axes, line: Line, css: str) -> Markup:
    bars = line.bars or [None] * len(line.x)
    names = line.names or [""] * len(line.x)
    points = [
        (x, y, bar, name)
        for x, y, bar, name in zip(line.x, line.y, bars, names, strict=True)
        if y is not None and (y > 0 or not axes.log)
    ]
    every = max(1, math.ceil(len(points) / BUCKETS))
    shown = []
    for i, (x, y, bar, name) in enumerate(points):
        if i % every and x != line.best and i != len(points) - 1:
            continue
        column, row = axes.place(x, y)
        if bar:
            ends = [axes.place(x, end)[1] for end in bar]
            shown.append(element("path", d=f"M{column:.1f} {ends[0]:.1f}V{ends[1]:.1f}", class_="bar"))
        title = f"{line.name}, {name or f'step {x:g}'}: {figure(y)}" + (" (best)" if x == line.best else "")
        best = " best" if x == line.best else ""
        radius = 4.5 if best else 3
        spot = element(
            "circle", element("title", title), cx=f"{column:.1f}", cy=f"{row:.1f}", r=radius, class_=css + best
        )
        shown.append(spot)
        if name:
            left = column > WIDTH - RIGHT - 30  # there is no room at its right
            at = f"{column - 5 if left else column + 5:.1f}"
            shown.append(element("text", name, x=at, y=f"{row - 5:.1f}", class_="end" if left else None))
    return joined(shown)


def _description(line: Line, runs: Sequence[Sequence[_Bucket]], across: str) -> str:
    """Describe a line for screen readers."""
    buckets = [bucket for run in runs for bucket in run]
    low, high = min(bucket.low for bucket in buckets), max(bucket.high for bucket in buckets)
    first, last = buckets[0], buckets[-1]
    return (
        f"{line.name}: from {figure(first.y)} at {across} {figure(first.x)} to {figure(last.y)} at {across} "
        f"{figure(last.x)}, lowest {figure(low)}, highest {figure(high)}"
    )


def _legend(chart: Chart, lines: Sequence[tuple[Line, object]]) -> Markup | None:
    keys = []
    if len(lines) > 1:
        for line, _ in lines:
            css = _css(line)
            dot = element("circle", cx=11, cy=6, r=3, class_=css) if line.style == "dots" else None
            keys.append((joined(element("path", d="M0 6H22", class_=f"line thick {css}"), dot), line.name))
    shapes = {"skipped": "M7 10h8l-4 -8z", "idle": "M11 10v-7", "saved": "M11 0V12"}
    names = {"skipped": "skipped step", "idle": "idle step", "saved": "step of the saved LoRA"}
    for kind in dict.fromkeys(mark.kind for mark in chart.marks):
        keys.append((element("path", d=shapes[kind], class_=kind), names[kind]))
    if any(line.best is not None for line, _ in lines):
        keys.append((element("circle", cx=11, cy=6, r=4.5, class_="best"), "best evaluation"))
    if not keys:
        return None
    entries = [
        element("li", element("svg", sign, viewBox="0 0 22 12", aria_hidden="true"), element("span", name))
        for sign, name in keys
    ]
    return element("ul", entries, class_="key")
