"""The table of an evaluation: each reward and measure, base against tuned, with the paired interval. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

FEW_PROMPTS = 5
"""With fewer prompts, the intervals are too wide or too uncertain to conclude much from."""

_BESIDE = ("diversity", "drift")


def sample_size(results: Mapping[str, Any], how: str = "") -> str:
    """Return how many prompts and images an evaluation has, and a warning if the prompts are few.

    Args:
        results: the content of evaluation.json or of a sweep's file.
        how: what follows the numbers in the sentence.
    """
    images, per = int(results["images"]), int(results.get("images_per_prompt", 1))
    prompts = int(results.get("prompt_count", images // per))
    text = f"{images} images of {prompts} prompt{'s' if prompts != 1 else ''}{how}."
    if prompts >= FEW_PROMPTS:
        return text
    return (
        f"{text} Warning: fewer than {FEW_PROMPTS} prompts say little about others. Evaluate on more (30 are a good "
        "start), with fewer images of each."
    )


class EvaluationTable:
    """An evaluation's results as a table; prints as text, and is HTML in a notebook.

    Args:
        results: the content of evaluation.json.

    Attributes:
        results: as above, with all numbers.
        columns: names of the columns.
        rows: one per reward or measure, formatted.
        note: how many prompts and images there are; intervals are clustered by prompt.
    """

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.results = results
        self.variants = [name for name, value in results.items() if isinstance(value, Mapping) and name not in _BESIDE]
        others = self.variants[1:]
        clustered = others and "prompt_count" in results  # earlier versions treated the images as independent
        self.note = sample_size(results, "; 95% intervals are clustered by prompt" if clustered else "")
        self.columns = ["measure", *self.variants] + (["difference", "change", "95% interval"] if others else ["std"])
        self.rows = [self._row(label) for label in results[self.variants[0]]]
        for label in _BESIDE:
            values = results.get(label, {})
            if self.variants[0] in values:
                found = [values[name] for name in self.variants]
                self.rows.append([label, *(f"{v['mean'] if isinstance(v, Mapping) else v:.4g}" for v in found)])

    def _row(self, label: str) -> list[str]:
        base = self.results[self.variants[0]][label]
        row = [label, f"{base['mean']:.5g}"]
        if not self.variants[1:]:
            return [*row, f"{base['std']:.3g}"]
        for name in self.variants[1:]:
            tuned = self.results[name][label]
            change = f"{tuned['difference'] / abs(base['mean']) * 100:+.1f}%" if base["mean"] else ""
            interval = "" if tuned["interval"] is None else "[{:+.4g}, {:+.4g}]".format(*tuned["interval"])
            row += [f"{tuned['mean']:.5g}", f"{tuned['difference']:+.4g}", change, interval]
        return row

    def __getitem__(self, label: str) -> dict[str, Any]:
        """Return a measure's numbers by variant: `table["aesthetic"]["tuned"]["mean"]`."""
        return {name: self.results[name][label] for name in self.variants}

    def __str__(self) -> str:
        """Return the table as aligned text, with the number of prompts and images below."""
        rows = [self.columns, *self.rows]
        widths = [max(len(row[i]) if i < len(row) else 0 for row in rows) for i in range(len(self.columns))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in rows]
        return "\n".join([*(line.rstrip() for line in lines), self.note])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{escape(self.note)}</p>"
