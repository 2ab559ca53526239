"""The page of one run."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from alignprop_core._files import write_atomic
from alignprop_core.errors import OutputError
from alignprop_report import about, page_sections
from alignprop_report.markup import Child, Markup, element, joined
from alignprop_report.run_files import Run
from alignprop_report.sheets import Album
from alignprop_report.summary import result, standing

GENERATOR = "alignprop report"
"""The generator in a page's metadata; only a file with this generator is overwritten."""


def run_page(run: Run) -> str:
    """Return a run's page as HTML that opens offline and loads nothing."""
    problems = list(run.problems)
    album = Album()
    gallery = page_sections.gallery(run, album, problems)
    album.fit()
    images = gallery()
    if album.left_out:
        problems.append(f"{album.left_out} images are not shown: the page would be too large.")
    sections = [
        page_sections.section("Result", "result", page_sections.result_table(run)),
        page_sections.section("Images", "images", images),
        page_sections.section("Curves", "curves", page_sections.curve_parts(run)),
        page_sections.section("Early stopping", "early-stopping", page_sections.stopping_parts(run)),
        page_sections.section("Strength", "strength", page_sections.strength_parts(run)),
        page_sections.section("Use it", "use", about.use(run)),
        page_sections.section("What was trained", "trained", about.trained(run)),
        page_sections.section("Environment", "environment", about.ran_on(run.environment)),
        page_sections.section("Config", "config", folded("config.yaml", element("pre", run.config_text, tabindex=0))),
    ]
    head = [
        element("h1", run.name),
        element("p", result(run), class_="lead"),
        element("p", _summary(run)),
        element("p", standing(run)),
        warnings("Licenses", about.license_warnings(run.environment)),
        warnings("Files that could not be read", problems),
    ]
    return document(run.name, head, sections)


def write_page(path: Path, page: str) -> None:
    """Write a page atomically; it replaces an older page, and no other file.

    Raises:
        OutputError: another file is there, or the page cannot be written.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder. Give the name of a file, such as {path / 'report.html'}.")
    if path.exists():
        with open(path, "rb") as file:
            start = file.read(4096)
        if f'content="{GENERATOR}"'.encode() not in start:
            raise OutputError(f"{path} exists and is not a report; it is not overwritten. Choose another --output.")
    write_atomic(path, page)


def document(title: str, head: Sequence[Child], sections: Sequence[Markup | None]) -> str:
    """Return a complete page; its content security policy allows its own style sheet and no scripts or loading."""
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
    """Return content that is shown on a click."""
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
    """Return one line on what was trained."""
    rewards = ", ".join(about.term_text(term) for term in run.rewards)
    names = element("b", about.model_name(run.config)), element("b", rewards or "unknown rewards")
    return joined("Trained ", names[0], " on ", names[1], ": ", ", ".join(about.in_short(run)), ".")
