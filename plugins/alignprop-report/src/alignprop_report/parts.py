"""The parts of a page that show what a run did: its result, pictures, curves and guards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from alignprop_report import curves
from alignprop_report.axes import figure
from alignprop_report.chart import Chart, draw
from alignprop_report.markup import Child, Markup, element, facts, joined, table
from alignprop_report.pictures import Album, Cell, Sheet, open_sheet, previews, spread
from alignprop_report.read import Run, mapping, number, pick
from alignprop_report.words import Change, changes, drift_of, role, signed, spread_change

STEPS_SHOWN, PROMPTS_SHOWN, PAIRS_SHOWN, DROPPED_SHOWN = 7, 8, 12, 20
Later = Callable[[], Markup]
"""Makes a part once all pictures of a page are known."""


def section(title: str, name: str, *content: Child) -> Markup | None:
    """Return a section with its heading; None if there is nothing in it."""
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
    told = table(columns, rows, caption="Before and after, the same prompts and seeds", numbers=range(2, 8))
    note = "The interval is of the mean paired difference; one that includes 0 may be chance."
    return joined(told, element("p", note, class_="note"))


def gallery(run: Run, album: Album, problems: list[str]) -> Later:
    """Take in the sheet before and after, and the previews; returns what makes the part."""
    parts = [_pairs(run, album, problems), _strips(run, album, problems)]
    return lambda: joined(part() for part in parts)


def charts(title: str, shown: Iterable[Chart], note: str = "") -> Markup | None:
    """Return charts under a heading of their own; None if all are empty."""
    drawn = [chart for chart in map(draw, shown) if chart is not None]
    if not drawn:
        return None
    told = element("p", note, class_="note") if note else None
    return joined(element("h3", title), told, element("div", drawn, class_="charts"))


def curve_parts(run: Run) -> Markup:
    """Return all curves over the steps."""
    noisy = "Thin: each step, with its range where many are joined. Thick: running mean. Dots: held-out prompts."
    return joined(
        charts("Scores", curves.score_charts(run), noisy),
        charts("What the mix did" if len(run.labels) > 1 else "At the limits", curves.mix_charts(run)),
        charts("On held-out prompts", curves.held_out_charts(run)),
        charts("Gradient", curves.step_charts(run)),
    )


def strength_parts(run: Run) -> Markup:
    """Return the curves of `alignprop evaluate --strengths` and `--soup`."""
    heads = {"strengths": "Strength of the LoRA", "soup": "Shares of two LoRAs"}
    notes = {
        "strengths": "Each point is a strength; bars are 95% intervals of the difference to the base model.",
        "soup": f"Each point is the share of {pick(run.curves.get('soup'), 'soup') or 'the other LoRA'}.",
    }
    return joined(
        charts(heads[name], curves.curve_charts(name, data), notes[name]) for name, data in run.curves.items()
    )


def guard_parts(run: Run) -> Markup:
    """Return what the guards were set to and what they did."""
    set_to = {key: value for key, value in mapping(run.config.get("guards")).items() if value not in (None, False)}
    pairs: list[tuple[str, Child]] = []
    if run.stop_reason:
        pairs.append(("stopped by", run.stop_reason))
    best = run.best_step
    if best is not None:
        pairs.append(("best evaluation", f"step {best:.0f}"))
    if set_to:
        pairs.append(("set to", ", ".join(f"{key} {value}" for key, value in set_to.items())))
    dropped = [row for row in run.steps if row.get("dropped")]
    idle = [row for row in run.steps if row.get("idle")]
    pairs.append(("dropped steps", str(len(dropped)) if dropped else "none"))
    if idle:
        pairs.append(("steps that did nothing", f"{len(idle)} ({_ranges(idle)}): {idle[-1]['idle']}"))
    rows = [[str(row["step"]), str(row["dropped"])] for row in dropped[:DROPPED_SHOWN]]
    more = len(dropped) - len(rows)
    return joined(
        facts(pairs),
        table(["step", "why"], rows, caption="Dropped steps") if rows else None,
        element("p", f"And {more} more, in metrics.jsonl.", class_="note") if more else None,
    )


def pair_figure(cell: Cell, album: Album) -> Later:
    """Take in a prompt's pictures before and after; returns what makes their figure."""
    shown = [(head, album.add(picture, f"{head}: {cell.prompt}")) for head, picture in cell.pictures.items()]

    def make() -> Markup:
        pictures = [element("div", image(), element("span", head, class_="head")) for head, image in shown]
        lines = [element("span", line, class_="note", dir="auto") for line in cell.lines[1:]]
        caption = element("figcaption", element("span", cell.prompt, dir="auto"), lines)
        return element("figure", element("div", pictures, class_="pair"), caption)

    return make


def _pairs(run: Run, album: Album, problems: list[str]) -> Later:
    path = run.path / "images" / "before_after.png"
    sheet = open_sheet(path, problems) if path.is_file() else None
    if sheet is None:
        return Markup
    heading = element("h3", "Before and after")
    if not sheet.cells:
        whole = _whole(sheet, album, "Before and after: for each prompt the base model's picture and the tuned model's")
        return lambda: joined(heading, whole())
    made = [pair_figure(cell, album) for cell in sheet.cells[:PAIRS_SHOWN]]
    more = len(sheet.cells) - len(made)
    note = element("p", f"And {more} more prompts, in images/before_after.png.", class_="note") if more else None
    return lambda: joined(heading, element("div", [make() for make in made], class_="pairs"), note)


def _strips(run: Run, album: Album, problems: list[str]) -> Later:
    """One strip of pictures a prompt, over the steps."""
    found = previews(run.path)
    opened = [(step, open_sheet(found[step], problems)) for step in spread(list(found), STEPS_SHOWN)]
    sheets = [(step, sheet) for step, sheet in opened if sheet is not None]
    if not sheets:
        return Markup
    seed = number(pick(run.config, "samples", "seed"))
    seeds = "" if seed is None else f" Every strip keeps its noise (samples.seed {seed:.0f})."
    intro = joined(
        element("h3", "Along the way"),
        element("p", f"The same prompt at different steps; strips scroll sideways.{seeds}", class_="note"),
    )
    cut = [(step, sheet) for step, sheet in sheets if sheet.cells]
    if not cut:
        chosen = [sheets[0], sheets[-1]] if len(sheets) > 1 else sheets
        wholes = [
            (step, _whole(sheet, album, f"Pictures at step {step}, each above its prompt")) for step, sheet in chosen
        ]
        return lambda: joined(intro, [joined(element("p", f"Step {step}"), make()) for step, make in wholes])
    strips: dict[tuple[int, str], list[tuple[int, Callable[[], Markup]]]] = {}
    for step, sheet in cut:
        for place, cell in enumerate(sheet.cells[:PROMPTS_SHOWN]):
            for picture in cell.pictures.values():
                image = album.add(picture, f"step {step}: {cell.prompt}")
                strips.setdefault((place, cell.prompt), []).append((step, image))
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
    shown = [f"{low} to {high}" if high > low else str(low) for low, high in ranges[:DROPPED_SHOWN]]
    return "steps " + ", ".join(shown) + (" and more" if len(ranges) > DROPPED_SHOWN else "")
