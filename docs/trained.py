"""Cut pictures before and after training out of runs' sheets, for docs/results/rewards.md.

    python docs/trained.py runs/aesthetic runs/hpsv2 ...

Writes images/trained/RUN.webp for each run folder: six held-out prompts, evenly spread over the run's, the base model's
pictures above and the tuned one's at the same seeds below. Nothing is chosen by hand. No test runs it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from alignprop_core.evaluation.report.pictures import open_sheet, spread

PICTURES = Path(__file__).parent / "images" / "trained"
SIDE, GAP, COLUMNS = 128, 4, 6


def strip(run: Path) -> Image.Image:
    """Return the picture of one run."""
    sheet = open_sheet(run / "images" / "before_after.png", problems := [])
    if sheet is None:
        raise SystemExit(f"{run}: {problems[0]}")
    cells = spread(sheet.cells, COLUMNS)
    whole = Image.new("RGB", (len(cells) * (SIDE + GAP) - GAP, 2 * SIDE + GAP), "white")
    for column, cell in enumerate(cells):
        for row, head in enumerate(("base", "tuned")):
            picture = cell.pictures[head].resize((SIDE, SIDE), Image.Resampling.BOX)
            whole.paste(picture, (column * (SIDE + GAP), row * (SIDE + GAP)))
    return whole


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    PICTURES.mkdir(parents=True, exist_ok=True)
    for run in parser.parse_args().runs:
        strip(run).save(PICTURES / f"{run.name}.webp", quality=80, method=6)


if __name__ == "__main__":
    main()
