"""The sections of a page on what a run did: result, images, curves, early stopping."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from alignprop_report import run_charts
from alignprop_report.axes import figure
from alignprop_report.chart import Chart, draw
from alignprop_report.markup import Child, Markup, element, facts, joined, table
from alignprop_report.run_files import Run, mapping, number, pick
from alignprop_report.sheets import Album, Cell, Sheet, open_sheet, previews, spread
from alignprop_report.summary import Change, changes, drift_of, role, sample, signed, spread_change

STEPS_SHOWN, PROMPTS_SHOWN, PAIRS_SHOWN, SKIPPED_SHOWN = 7, 8, 12, 20
Later = Callable[[], Markup]
"""Builds a section after all images of a page are known."""


def section(title: str, name: str, *content: Child) -> Markup | None:
    """Return a section with its heading; None if it is empty."""
    inside = joined(*content)
    if not inside:
        return None
    return element("section", element("h2", title), inside, id=name)


def result_table(run: Run) -> Markup | None:
    """Return evaluation.json as a table: scores, diversity and drift, base against tuned."""
    rows: list[list[Child]] = [
        [change.label, role(run, change.label), *_cells(change)] for change in changes(run.comparison)
    ]
    if diversity := spread_change(run.comparison):
        rows.append([diversity.label, "within a prompt", *_cells(diversity)])
    drift = drift_of(run.comparison)
    if drift is not None:
        rows.append(["drift", "from the base", "0", figure(drift), "", "", "", ""])
    if not rows:
        return None
    columns = ["measure", "what it is", "base", "tuned", "difference", "change", "95% interval", "n"]
    content = table(columns, rows, caption="Before and after, the same prompts and seeds", numbers=range(2, 8))
    note = "The interval is of the mean paired difference. If it includes 0, the difference may be chance."
    return joined(content, element("p", " ".join(filter(None, [sample(run.comparison), note])), class_="note"))


def gallery(run: Run, album: Album, problems: list[str]) -> Later:
    """Add the before/after sheet and the previews; return the function that builds the section."""
    parts = [_pairs(run, album, problems), _strips(run, album, problems)]
    return lambda: joined(part() for part in parts)


def charts(title: str, shown: Iterable[Chart], note: str = "") -> Markup | None:
    """Return charts with a heading; None if all are empty."""
    drawn = [chart for chart in map(draw, shown) if chart is not None]
    if not drawn:
        return None
    content = element("p", note, class_="note") if note else None
    return joined(element("h3", title), content, element("div", drawn, class_="charts"))


def curve_parts(run: Run) -> Markup:
    """Return all curves over the steps."""
    noisy = "Thin: each step (in long runs, mean and range of several). Thick: running mean. Dots: held-out prompts."
    return joined(
        charts("Scores", run_charts.score_charts(run), noisy),
        charts("What the mix did" if len(run.labels) > 1 else "Saturated images", run_charts.mix_charts(run)),
        charts("On held-out prompts", run_charts.held_out_charts(run)),
        charts("Gradient", run_charts.step_charts(run)),
    )


def strength_parts(run: Run) -> Markup:
    """Return the curves of `alignprop evaluate --strengths` and `--soup`."""
    heads = {"strengths": "Strength of the LoRA", "soup": "Shares of two LoRAs"}
    notes = {
        "strengths": "Each point is a strength; bars are 95% intervals of the difference to the base model.",
        "soup": f"Each point is the share of {pick(run.curves.get('soup'), 'soup') or 'the other LoRA'}.",
    }
    return joined(
        charts(heads[name], run_charts.curve_charts(name, data), f"{notes[name]} {sample(data)}".rstrip())
        for name, data in run.curves.items()
    )


def stopping_parts(run: Run) -> Markup:
    """Return the settings of early stopping, why the run stopped, and skipped and idle steps."""
    set_to = {
        key: value for key, value in mapping(run.config.get("early_stopping")).items() if value not in (None, False)
    }
    pairs: list[tuple[str, Child]] = []
    if run.stop_reason:
        pairs.append(("stopped because", run.stop_reason))
    best = run.best_step
    if best is not None:
        pairs.append(("best evaluation", f"step {best:.0f}"))
    if set_to:
        pairs.append(("settings", ", ".join(f"{key} {value}" for key, value in set_to.items())))
    skipped = [row for row in run.steps if row.get("skipped")]
    idle = [row for row in run.steps if row.get("idle")]
    pairs.append(("skipped steps", str(len(skipped)) if skipped else "none"))
    if idle:
        pairs.append(("idle steps", f"{len(idle)} ({_ranges(idle)}): {idle[-1]['idle']}"))
    rows = [[str(row["step"]), str(row["skipped"])] for row in skipped[:SKIPPED_SHOWN]]
    more = len(skipped) - len(rows)
    return joined(
        facts(pairs),
        table(["step", "why"], rows, caption="Skipped steps") if rows else None,
        element("p", f"And {more} more, in metrics.jsonl.", class_="note") if more else None,
    )


def pair_figure(cell: Cell, album: Album) -> Later:
    """Add a prompt's images; return the function that builds their figure."""
    shown = [(head, album.add(image, f"{head}: {cell.prompt}")) for head, image in cell.images.items()]

    def make() -> Markup:
        images = [element("div", image(), element("span", head, class_="head")) for head, image in shown]
        lines = [element("span", line, class_="note", dir="auto") for line in cell.lines[1:]]
        caption = element("figcaption", element("span", cell.prompt, dir="auto"), lines)
        return element("figure", element("div", images, class_="pair"), caption)

    return make


def _pairs(run: Run, album: Album, problems: list[str]) -> Later:
    path = run.path / "images" / "before_after.png"
    sheet = open_sheet(path, problems) if path.is_file() else None
    if sheet is None:
        return Markup
    heading = element("h3", "Before and after")
    if not sheet.cells:
        whole = _whole(
            sheet, album, "Before and after: for each prompt, the image of the base model and of the tuned model"
        )
        return lambda: joined(heading, whole())
    made = [pair_figure(cell, album) for cell in sheet.cells[:PAIRS_SHOWN]]
    more = len(sheet.cells) - len(made)
    note = element("p", f"And {more} more prompts, in images/before_after.png.", class_="note") if more else None
    return lambda: joined(heading, element("div", [make() for make in made], class_="pairs"), note)


def _strips(run: Run, album: Album, problems: list[str]) -> Later:
    """Return one strip of images per prompt, over the steps."""
    found = previews(run.path)
    opened = [(step, open_sheet(found[step], problems)) for step in spread(list(found), STEPS_SHOWN)]
    sheets = [(step, sheet) for step, sheet in opened if sheet is not None]
    if not sheets:
        return Markup
    given = pick(run.config, "previews", "seeds")
    known = [seed for value in given if (seed := number(value)) is not None] if isinstance(given, list) else []
    listed = ", ".join(f"{seed:.0f}" for seed in known)
    seeds = f" Every strip uses the same noise (previews.seeds: {listed})." if known else ""
    intro = joined(
        element("h3", "During training"),
        element("p", f"The same prompt at different steps; strips scroll sideways.{seeds}", class_="note"),
    )
    cut = [(step, sheet) for step, sheet in sheets if sheet.cells]
    if not cut:
        chosen = [sheets[0], sheets[-1]] if len(sheets) > 1 else sheets
        wholes = [
            (step, _whole(sheet, album, f"Images at step {step}, each above its prompt")) for step, sheet in chosen
        ]
        return lambda: joined(intro, [joined(element("p", f"Step {step}"), make()) for step, make in wholes])
    strips: dict[tuple[int, str], list[tuple[int, Callable[[], Markup]]]] = {}
    for step, sheet in cut:
        for place, cell in enumerate(sheet.cells[:PROMPTS_SHOWN]):
            for image in cell.images.values():
                make = album.add(image, f"step {step}: {cell.prompt}")
                strips.setdefault((place, cell.prompt), []).append((step, make))
    return lambda: joined(intro, [_strip(prompt, shown) for (_, prompt), shown in strips.items()])


def _strip(prompt: str, shown: Sequence[tuple[int, Callable[[], Markup]]]) -> Markup:
    frames = [element("li", image(), element("span", f"step {step}", class_="head")) for step, image in shown]
    row = element("ol", frames, class_="strip", tabindex=0)
    return element("figure", row, element("figcaption", element("span", prompt, dir="auto")))


def _whole(sheet: Sheet, album: Album, alt: str) -> Later:
    image = album.add(sheet.whole, alt, larger=4)
    return lambda: element("figure", image(), class_="whole")


def _cells(change: Change) -> list[Child]:
    interval = "" if change.interval is None else f"{signed(change.interval[0])} to {signed(change.interval[1])}"
    n = "" if change.n is None else str(change.n)
    return [figure(change.base), figure(change.tuned), signed(change.difference), change.percent, interval, n]


def _ranges(rows: Sequence[Mapping[str, object]]) -> str:
    """Return steps as ranges: 3, 7 to 9."""
    ranges: list[list[int]] = []
    for row in rows:
        step = int(number(row["step"]) or 0)
        if ranges and step == ranges[-1][1] + 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    shown = [f"{low} to {high}" if high > low else str(low) for low, high in ranges[:SKIPPED_SHOWN]]
    return "steps " + ", ".join(shown) + (" and more" if len(ranges) > SKIPPED_SHOWN else "")
