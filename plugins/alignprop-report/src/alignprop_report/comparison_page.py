"""One page that compares several runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alignprop_report import about, page_sections, run_charts
from alignprop_report.axes import figure
from alignprop_report.chart import Chart, Line
from alignprop_report.markup import Child, Markup, element, joined, table
from alignprop_report.run_files import Run, mapping, pick
from alignprop_report.run_page import document, warnings
from alignprop_report.sheets import Album, Cell, open_sheet
from alignprop_report.summary import changes, drift_of, result, sample, signed, spread_change, standing

_BESIDE = 3
"""Images per prompt up to which two prompts fit side by side."""

_SAME = ("prompts", "images", "images_per_prompt", "seed")
"""What evaluations must share to be comparable."""


def several_page(runs: Sequence[Run]) -> str:
    """Return a page that compares runs, as HTML that opens offline and loads nothing.

    Args:
        runs: two or more, in the order of the page.
    """
    names = names_of(runs)
    problems = [f"{name}: {problem}" for name, run in zip(names, runs, strict=True) for problem in run.problems]
    licenses = [
        f"{name}: {warning}"
        for name, run in zip(names, runs, strict=True)
        for warning in about.license_warnings(run.environment)
    ]
    album = Album()
    gallery = _gallery(runs, names, album, problems)
    album.fit()
    images = gallery()
    if album.left_out:
        problems.append(f"{album.left_out} images are not shown: the page would be too large.")
    summaries = [
        element("li", element("b", name), ": ", result(run), " ", standing(run))
        for name, run in zip(names, runs, strict=True)
    ]
    sections = [
        page_sections.section("Results", "result", _results(runs, names)),
        page_sections.section("Images", "images", images),
        page_sections.section("Curves", "curves", _curves(runs, names)),
        page_sections.section("Differences", "config", _differences(runs, names)),
        page_sections.section("Run folders", "folders", _folders(runs, names)),
    ]
    title = f"{len(runs)} runs compared"
    head = [
        element("h1", title),
        element("ul", summaries),
        warnings("Licenses", licenses),
        warnings("Files that could not be read", problems),
        warnings("Not comparable", _unlike(runs)),
    ]
    return document(title, head, sections)


def names_of(runs: Sequence[Run]) -> list[str]:
    """Return a name for each run: its folder's, with as many folders above as tell them apart."""
    depth = 1
    while True:
        names = ["/".join(run.path.parts[-depth:]) for run in runs]
        if len(set(names)) == len(names) or depth > max(len(run.path.parts) for run in runs):
            return names
        depth += 1


def _results(runs: Sequence[Run], names: Sequence[str]) -> Markup | None:
    """Return one row per run, one column per measure: the tuned mean, and its difference to the base model."""
    found = [{change.label: change for change in changes(run.comparison)} for run in runs]
    for known, run in zip(found, runs, strict=True):
        if diversity := spread_change(run.comparison):
            known[diversity.label] = diversity
    labels = list(dict.fromkeys(label for known in found for label in known))
    if not labels:
        return None
    rows: list[list[Child]] = []
    for name, known, run in zip(names, found, runs, strict=True):
        cells: list[Child] = []
        for label in labels:
            change = known.get(label)
            if change is None:
                cells.append("")
                continue
            within = ""
            if change.interval is not None:
                within = f" [{signed(change.interval[0])}, {signed(change.interval[1])}]"
            moved = element("span", f"{signed(change.difference)}{within}", class_="note")
            cells.append(joined(figure(change.tuned), element("br"), moved))
        drift = drift_of(run.comparison)
        size = element("span", sample(run.comparison), class_="note")
        rows.append([name, *cells, "" if drift is None else figure(drift), size])
    caption = "Tuned models; below, the difference to the base model with its paired 95% interval"
    return table(["run", *labels, "drift", "held-out images"], rows, caption=caption, numbers=range(1, len(labels) + 2))


def _curves(runs: Sequence[Run], names: Sequence[str]) -> Markup:
    """Return charts with one line per run."""
    numbered = list(enumerate(zip(names, runs, strict=True)))

    def steps(*keys: str) -> list[Line]:
        return [Line(name, *run_charts.of_steps(run, *keys), color=i, style="trend") for i, (name, run) in numbered]

    def held_out(*keys: str) -> list[Line]:
        return [
            Line(name, *run_charts.of_evaluations(run, *keys), color=i, style="dots", best=run.best_step)
            for i, (name, run) in numbered
        ]

    trained = list(dict.fromkeys(label for run in runs for label in run_charts.trained_labels(run)))
    evaluated = list(dict.fromkeys(label for run in runs for label in run_charts.evaluated_labels(run)))
    scores = [Chart(label, steps("terms", label, "raw")) for label in trained]
    if len(trained) > 1:
        note = "the total of each run; different mixes have different units"
        scores.insert(0, Chart("total", steps("total"), note=note))
    apart = [Chart(f"{label}, held out", held_out("scores", label, "mean")) for label in evaluated]
    apart.append(Chart("drift from the base model", held_out("drift"), within=[0.0]))
    apart.append(Chart("diversity", held_out("diversity"), within=[0.0]))
    mixed = [run for run in runs if len(run_charts.trained_labels(run)) > 1]
    shares = [
        Chart(f"share of {label}", steps("terms", label, "share"), within=[0.0, 1.0]) for label in trained if mixed
    ]
    return joined(
        page_sections.charts("Scores in training", scores, "Running means."),
        page_sections.charts("On held-out prompts", apart),
        page_sections.charts("What the mixes did", shares),
        page_sections.charts("Gradient", [Chart(run_charts.GRADIENT, steps("grad_norm"), "before clipping", log=True)]),
    )


def _gallery(runs: Sequence[Run], names: Sequence[str], album: Album, problems: list[str]) -> page_sections.Later:
    """Return, for each prompt, the base model's image and the image of every run."""
    by_prompt: dict[str, dict[str, Any]] = {}
    for name, run in zip(names, runs, strict=True):
        path = run.path / "images" / "before_after.png"
        sheet = open_sheet(path, problems) if path.is_file() else None
        for cell in () if sheet is None else sheet.cells:
            shown = by_prompt.setdefault(cell.prompt, {})
            for head, image in cell.images.items():
                shown.setdefault("base" if head == "base" else name, image)
    cells = [Cell(images, (prompt,)) for prompt, images in by_prompt.items()]
    # Base images differ where models, seeds or sampling differ; the first run's is shown.
    unlike = " The base image is from the first run; those of other runs may differ." if _unlike(runs) else ""
    made = [page_sections.pair_figure(cell, album) for cell in cells[: page_sections.PAIRS_SHOWN]]
    if not made:
        return Markup
    note = element("p", f"Held-out prompts: the base model and each run.{unlike}", class_="note")
    wide = max(len(cell.images) for cell in cells) > _BESIDE
    return lambda: joined(note, element("div", [make() for make in made], class_="pairs wider" if wide else "pairs"))


def _unlike(runs: Sequence[Run]) -> list[str]:
    """Return sentences on why evaluations are not comparable."""
    known = [run.comparison for run in runs if run.comparison is not None]
    differing = [key for key in _SAME if len({json.dumps(pick(data, key), default=str) for data in known}) > 1]
    found = []
    if differing:
        found.append(f"The evaluations differ in {', '.join(differing)}: compare differences to the base, not means.")
    models = {json.dumps([pick(run.config, "model"), pick(run.config, "sampling")], default=str) for run in runs}
    if len(models) > 1:
        found.append("The runs differ in model or sampling, so their base images and scores differ too.")
    return found


def _differences(runs: Sequence[Run], names: Sequence[str]) -> Markup:
    """Return one row per config key in which the runs differ."""
    flat = [dict(_flat(run.config)) for run in runs]
    keys = [key for key in dict.fromkeys(key for known in flat for key in known) if not key.startswith("output")]
    rows = [[key, *(known.get(key, "") for known in flat)] for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    if not differing:
        return element("p", "The configs differ only in the output folder.")
    return table(["key", *names], differing, caption="Keys of the config in which the runs differ")


def _flat(data: object, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(data, Mapping) and data:
        for name, value in data.items():
            yield from _flat(value, f"{key}.{name}" if key else str(name))
    elif isinstance(data, list) and any(isinstance(item, Mapping) for item in data):
        for place, value in enumerate(data):
            yield from _flat(value, f"{key}.{place}")
    else:
        yield key, data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, default=str)


def _folders(runs: Sequence[Run], names: Sequence[str]) -> Markup:
    rows: list[list[Child]] = []
    for name, run in zip(names, runs, strict=True):
        rewards = ", ".join(about.term_text(term) for term in run.rewards)
        core = str(mapping(run.environment.get("versions")).get("alignprop-core") or "")
        rows.append([name, str(run.path), about.model_name(run.config), rewards, core])
    return table(["run", "folder", "model", "rewards", "alignprop-core"], rows, caption="The runs")
