"""The example notebooks and the script with an own training loop run; notebooks are stored without outputs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

pytest.importorskip("alignprop_starter")

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))
SHORT = {"STEPS = 20": "STEPS = 2", '"steps": 12': '"steps": 3', '"batch_size": 4': '"batch_size": 2'}


def load(path: Path) -> Any:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    for cell in load(path).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_progress_and_images(path: Path, tmp_path: Path) -> None:
    notebook = load(path)
    for cell in notebook.cells:
        for text, short in SHORT.items():
            cell.source = cell.source.replace(text, short)
    assert any("STEPS = 2" in cell.source and "STEPS = 20" not in cell.source for cell in notebook.cells)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pages = "\n".join(output.get("data", {}).get("text/html", "") for output in outputs)
    assert "step 2/2" in pages
    assert re.search(r"<p>Step 2</p><img [^>]*data:image/jpeg;base64", pages)
    assert "<table>" in pages
    printed = "\n".join(output.get("text", "") for output in outputs if output.get("name") == "stderr")
    assert "step 1/2" not in printed, "the bar, and not lines"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_own_loop_saves_a_lora(tmp_path: Path) -> None:
    script = EXAMPLES / "own_loop.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) < 30
    done = subprocess.run(
        [sys.executable, str(script), "1", str(tmp_path)], capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert {file.name for file in tmp_path.iterdir()} == {"pytorch_lora_weights.safetensors", "own_loop.safetensors"}
