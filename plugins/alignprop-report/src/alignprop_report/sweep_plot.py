"""Plots of strength and soup curves as PNG files, drawn with matplotlib."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignprop_core._files import write_atomic
from alignprop_report.run_charts import curve_charts

_COLUMNS = 3


def write_plots(folder: Path) -> None:
    """Write images/strengths.png and images/soup.png for the JSON files in a folder that are newer than their plots."""
    for name in ("strengths", "soup"):
        source, target = folder / f"{name}.json", folder / "images" / f"{name}.png"
        if source.is_file() and not (target.is_file() and target.stat().st_mtime >= source.stat().st_mtime):
            image = plot(name, json.loads(source.read_bytes()))
            if image is not None:
                target.parent.mkdir(exist_ok=True)
                write_atomic(target, image)


def plot(name: str, data: Mapping[str, Any]) -> bytes | None:
    """Return a PNG file with one panel per score; None if there are no points.

    Args:
        name: "strengths" or "soup".
        data: the content of the JSON file of that name.
    """
    # matplotlib takes a second to import, and only evaluations with a curve need it. `Figure` has no global state.
    from matplotlib.figure import Figure

    charts = [chart for chart in curve_charts(name, data) if any(y is not None for y in chart.lines[0].y)]
    if not charts:
        return None
    columns = min(_COLUMNS, len(charts))
    rows = math.ceil(len(charts) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for chart, panel in zip(charts, panels, strict=False):
        (line,) = chart.lines
        shown = [
            (x, y, bar or (y, y), label)
            for x, y, bar, label in zip(line.x, line.y, line.bars, line.names, strict=True)
            if y is not None
        ]
        panel.vlines([x for x, *_ in shown], *zip(*(bar for _, _, bar, _ in shown), strict=True), colors="0.5")
        panel.plot([x for x, *_ in shown], [y for _, y, *_ in shown], marker="o", markersize=5)
        for x, y, _, label in shown:
            panel.annotate(label, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
        # A label is text, also one that has mathematics' dollar signs.
        panel.set_title(chart.title, parse_math=False, fontsize=10)
        panel.set_xlabel(chart.across, parse_math=False)
        panel.margins(0.08)
        panel.grid(color="0.9")
        panel.set_axisbelow(True)
    for panel in panels:
        panel.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
