"""Plot held-out scores over the steps of one or several runs.

    python tools/docs/curves.py runs/sum runs/balanced --measures hpsv2 jpeg_bytes --output docs/images/mix.png

Reads the evaluations in each run's metrics.jsonl (`evaluation.every`). Needs matplotlib (the `docs` extra). The
curves in the guides were made with it from the runs in docs/results; no test runs it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt


def evaluations(run: Path) -> list[tuple[int, dict[str, float]]]:
    """Return (step, measure -> mean) of each held-out evaluation, with drift and diversity among the measures."""
    found = []
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "evaluation" in record:
            result = record["evaluation"]
            scores = {name: entry["mean"] for name, entry in result["scores"].items()}
            found.append((record["step"], scores | {key: result[key] for key in ("drift", "diversity")}))
    return found


def main() -> None:
    """Write the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--measures", nargs="+", required=True)
    parser.add_argument("--columns", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    columns = min(options.columns, len(options.measures))
    rows = -(-len(options.measures) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.4 * columns, 3.1 * rows), squeeze=False)
    for axis, measure in zip(axes.flat, options.measures, strict=False):
        for run in options.runs:
            points = evaluations(run)
            axis.plot(
                [step for step, _ in points], [values[measure] for _, values in points], marker="o", label=run.name
            )
        axis.set(title=measure, xlabel="step")
        axis.grid(visible=True, alpha=0.3)
    if len(options.runs) > 1:
        axes.flat[0].legend()
    figure.tight_layout()
    figure.savefig(options.output, dpi=100)


if __name__ == "__main__":
    main()
