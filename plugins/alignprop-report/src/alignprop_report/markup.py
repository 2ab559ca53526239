"""HTML from nested calls: all text is escaped, and only what is built here is markup.

element("p", "5 < 6 & ", element("b", "7 > 6"))   ->   <p>5 &lt; 6 &amp; <b>7 &gt; 6</b></p>
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from html import escape

_VOID = frozenset({"meta", "img", "br"})
# What HTML cannot contain, even escaped: control characters and halves of surrogate pairs.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


class Markup(str):
    """Text that is HTML already; made only by `element`, `joined` and `document`."""

    __slots__ = ()


Child = str | int | float | None | Iterable["Child"]
"""What an element may contain: markup as it is, other text escaped, nothing for None, and lists of these."""


def clean(text: object) -> str:
    """Return text with characters that HTML cannot contain replaced by U+FFFD."""
    return _FORBIDDEN.sub("\ufffd", str(text))


def joined(*children: Child) -> Markup:
    """Put children side by side."""
    return Markup("".join(_shown(child) for child in children))


def element(tag: str, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """Return an element.

    Args:
        tag: its name; a constant of the program, never of the data.
        children: its content.
        attributes: `class_="a"`, `aria_label="b"`: underscores become hyphens, one at the end is dropped. None and
            False leave an attribute out, True gives it without a value.
    """
    inside = "".join(_attribute(name, value) for name, value in attributes.items())
    if tag in _VOID:
        return Markup(f"<{tag}{inside}>")
    return Markup(f"<{tag}{inside}>{joined(*children)}</{tag}>")


def table(
    columns: Sequence[Child], rows: Iterable[Sequence[Child]], *, caption: str, numbers: Collection[int] = ()
) -> Markup:
    """Return a table in a box that scrolls sideways where it is too wide; a row's first cell is its header.

    Args:
        columns: headers.
        rows: cells.
        caption: what it shows; visible, and read out by screen readers.
        numbers: indices of columns with numbers, which are aligned right.
    """

    def kind(place: int) -> str | None:
        return "number" if place in numbers else None

    head = element("tr", [element("th", cell, scope="col", class_=kind(i)) for i, cell in enumerate(columns)])
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            [element("td", cell, class_=kind(i)) for i, cell in enumerate(row[1:], start=1)],
        )
        for row in rows
    ]
    content = element("table", element("caption", caption), element("thead", head), element("tbody", body))
    return element("div", content, class_="wide", role="region", aria_label=caption, tabindex=0)


def facts(pairs: Iterable[tuple[str, Child]]) -> Markup:
    """Return labeled facts below one another."""
    return element("dl", [joined(element("dt", name), element("dd", value)) for name, value in pairs])


def code(text: str) -> Markup:
    """Return a block of code unchanged."""
    return element("pre", element("code", text), tabindex=0)


def _attribute(name: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = name.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(clean(value))}"'


def _shown(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, str | int | float):
        return escape(clean(child))
    return "".join(_shown(part) for part in child)
