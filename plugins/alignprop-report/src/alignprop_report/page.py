"""The page of one run."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from alignprop_core._files import write_atomic
from alignprop_core.errors import OutputError
from alignprop_report import about, parts
from alignprop_report.markup import Child, Markup, element, joined
from alignprop_report.pictures import Album
from alignprop_report.read import Run
from alignprop_report.words import result, standing

GENERATOR = "alignprop report"
"""What a page says it was made by; only such a file is ever replaced by another page."""


def run_page(run: Run) -> str:
    """Return a run's page, HTML: one file that opens offline and loads nothing."""
    problems = list(run.problems)
    album = Album()
    gallery = parts.gallery(run, album, problems)
    album.fit()
    pictures = gallery()
    if album.left_out:
        problems.append(f"{album.left_out} pictures are left out: the page would be too large.")
    sections = [
        parts.section("Result", "result", parts.result_table(run)),
        parts.section("Pictures", "pictures", pictures),
        parts.section("Curves", "curves", parts.curve_parts(run)),
        parts.section("Guards", "guards", parts.guard_parts(run)),
        parts.section("Strength", "strength", parts.strength_parts(run)),
        parts.section("Use it", "use", about.use(run)),
        parts.section("What was trained", "trained", about.trained(run)),
        parts.section("What it ran on", "environment", about.ran_on(run.environment)),
        parts.section("The whole config", "config", folded("config.yaml", element("pre", run.config_text, tabindex=0))),
    ]
    head = [
        element("h1", run.name),
        element("p", result(run), class_="lead"),
        element("p", _summary(run)),
        element("p", standing(run)),
        warnings("Licences", about.license_warnings(run.environment)),
        warnings("Not everything could be read", problems),
    ]
    return document(run.name, head, sections)


def write_page(path: Path, page: str) -> None:
    """Write a page whole or not at all; it replaces an older page, and no other file.

    Raises:
        OutputError: something else lies there, or it cannot be written.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder. Give the name of a file, such as {path / 'report.html'}.")
    if path.exists():
        with open(path, "rb") as file:
            start = file.read(4096)
        if f'content="{GENERATOR}"'.encode() not in start:
            raise OutputError(f"{path} exists and is no report; it is not overwritten. Choose another --output.")
    write_atomic(path, page)


def document(title: str, head: Sequence[Child], sections: Sequence[Markup | None]) -> str:
    """Return a whole page; its policy lets it load nothing and run nothing, and take no style but its own."""
    style = files("alignprop_report").joinpath("style.css").read_text(encoding="utf-8")
    digest = b64encode(hashlib.sha256(style.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    shown = [part for part in sections if part]
    top = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("meta", name="generator", content=GENERATOR),
        element("title", f"{title}: alignprop"),
        element("style", Markup(style)),
    )
    body = element("body", element("header", *head), element("main", shown))
    return f"<!doctype html>\n{element('html', top, body, lang='en')}\n"


def folded(title: str, content: Markup) -> Markup:
    """Return content that is shown on a click, without a script."""
    return element("details", element("summary", title), content)


def warnings(title: str, sentences: Sequence[str]) -> Markup | None:
    """Return a box of sentences; None for none."""
    if not sentences:
        return None
    return element(
        "aside",
        element("strong", title),
        element("ul", [element("li", sentence) for sentence in sentences]),
        aria_label=title,
    )


def _summary(run: Run) -> Markup:
    """Say what was trained in one line."""
    rewards = ", ".join(about.term_told(term) for term in run.rewards)
    names = element("b", about.model_told(run.config)), element("b", rewards or "nothing that is known")
    return joined("Trained ", names[0], " on ", names[1], ": ", ", ".join(about.in_short(run)), ".")
