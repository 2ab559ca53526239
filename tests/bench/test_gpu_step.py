"""The GPU benchmark runs, with tiny networks, and its arithmetic is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.bench import gpu_gradient, gpu_step
from tests.bench.gpu_measure import Fit, union


def test_a_row_gives_a_result_for_each_side_and_a_page(tmp_path: Path) -> None:
    file, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    command = [
        "--tiny",
        "--rounds",
        "1",
        "--steps",
        "2",
        "--rows",
        "sparse8_b1",
        "--rivals",
        "plain",
        "--json",
        str(file),
    ]

    assert gpu_step.main(command) == 0
    assert gpu_step.main(["--report", str(file), "--output", str(page)]) == 0

    machine, *results = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert machine["kind"] == "machine"
    assert [(result["row"], result["side"]) for result in results] == [
        ("sparse8_b1", "plain"),
        ("sparse8_b1", "alignprop default"),
    ]
    assert all(result["first_seconds"] > 0 and result["median_s"] > 0 for result in results)
    assert page.read_text(encoding="utf-8").count("| alignprop default |") == 1


def test_a_later_run_replaces_a_row_and_adds_others(tmp_path: Path) -> None:
    runs: list[dict[str, list[str]]] = [{"full_b1": ["alignprop default"]}, {"last8_b4": ["trl", "alignprop default"]}]
    runs.append({"last8_b4": ["alignprop blocks"]})
    lines = []
    for run in runs:
        lines.append({"kind": "machine"})
        lines += [{"kind": "result", "row": row, "side": side} for row, sides in run.items() for side in sides]
    file = tmp_path / "results.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")

    found = gpu_step.read([file])["result"]
    assert [(result["row"], result["side"]) for result in found] == [
        ("last8_b4", "alignprop blocks"),
        ("full_b1", "alignprop default"),
    ]


def test_overlapping_intervals_count_once() -> None:
    assert union([(5, 8), (0, 4), (3, 6), (20, 21), (6, 7)]) == 9


def test_a_straight_line_is_fitted_exactly() -> None:
    fit = Fit.of([1, 2, 4], [5, 7, 11])
    assert (fit.slope, fit.intercept, fit.r2) == pytest.approx((2, 3, 1))


def test_goals_compare_with_trl_and_with_another_row() -> None:
    def result(row: str, side: str, seconds: list[float], gib: float, built: float = 2.0) -> dict[str, object]:
        shared = {"row": row, "side": side, "kept": [8] * len(seconds), "built_gib": built}
        return {**shared, "seconds": seconds, "median_s": seconds[0], "peak_gib": gib}

    results = [
        result("last8_b4", "trl", [6.0, 6.0], 10.0),
        result("last8_b4", "alignprop default", [2.0, 2.0], 8.0),
        result("last8_b4", "alignprop blocks", [2.4, 2.4], 10.0, built=8.0),  # 6 of them are the default's
        result("last8_b1", "alignprop default", [1.0], 4.0),
        result("drtune8_b1", "alignprop default", [1.2], 4.0),
    ]
    goals = gpu_step.judge({"steps": 50, "matmul_tflops": 0.0}, results)
    assert [(goal["row"], goal["measure"], round(goal["value"], 2), goal["met"]) for goal in goals] == [
        ("last8_b4", "seconds", 0.33, True),
        ("last8_b4", "gib", 0.8, False),
        ("last8_b4", "seconds", 0.4, True),
        ("last8_b4", "gib", 0.4, True),
        ("drtune8_b1", "seconds", 1.2, False),
        ("drtune8_b1", "gib", 1.0, True),
    ]


def test_useful_work_counts_no_recomputation() -> None:
    # 4 images: 50 guided UNet passes and 8 backward, a decoder pass and its backward.
    assert gpu_step.useful_tflop(50, {"batch": 4, "kept": [8, 8]}) == pytest.approx(391, abs=1)


@pytest.mark.slow
def test_the_gradient_script_runs_on_tiny_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # restored afterwards
    gpu_gradient.main(["--tiny", "--steps", "3", "--levels", "block checkpointing", "--output", str(page)])
    (row,) = [line for line in page.read_text().splitlines() if line.startswith("| float64 | alignprop")]
    assert float(row.split("|")[3]) < 1e-9
