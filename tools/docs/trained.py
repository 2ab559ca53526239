"""Crop images before and after training from runs' before/after sheets, for docs/results/rewards.md.

    python tools/docs/trained.py runs/aesthetic runs/hpsv2 ...

Writes docs/images/trained/RUN.webp for each run folder: six held-out prompts, evenly spread over the run's, the base
model's images above and the tuned model's at the same seeds below. Nothing is selected by hand. No test runs it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from alignprop_report.sheets import open_sheet, spread

FOLDER = Path(__file__).parents[2] / "docs" / "images" / "trained"
SIDE, GAP, COLUMNS = 128, 4, 6


def strip(run: Path) -> Image.Image:
    """Return the strip of one run."""
    sheet = open_sheet(run / "images" / "before_after.png", problems := [])
    if sheet is None:
        raise SystemExit(f"{run}: {problems[0]}")
    cells = spread(sheet.cells, COLUMNS)
    whole = Image.new("RGB", (len(cells) * (SIDE + GAP) - GAP, 2 * SIDE + GAP), "white")
    for column, cell in enumerate(cells):
        for row, head in enumerate(("base", "tuned")):
            picture = cell.images[head].resize((SIDE, SIDE), Image.Resampling.BOX)
            whole.paste(picture, (column * (SIDE + GAP), row * (SIDE + GAP)))
    return whole


def main() -> None:
    """Write the strips."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for run in parser.parse_args().runs:
        strip(run).save(FOLDER / f"{run.name}.webp", quality=80, method=6)


if __name__ == "__main__":
    main()
