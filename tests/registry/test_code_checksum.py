"""A checksum of code: it changes with what the code does, and with nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from alignprop_core.registry.code_checksum import SCHEME, code_checksum

FUNCTION = '''
SCALE = 2.0
def helper(x): return x.mean((1, 2, 3))
def code(images, prompts=None):
    """Bright."""
    return SCALE * helper(images) if "a" in {"a", "b"} else 0
'''
CLASS = """
from alignprop_core import Reward
class Base(Reward):
    gain = 1.0
    def apply(self, x): return x * self.gain
class code(Base):
    def __init__(self, config=None):
        super().__init__(config)
    @torch.no_grad()
    def score(self, batch): return self.apply(batch.images).mean((1, 2, 3))
"""


def typed(source: str) -> Any:
    """Return `code` of source that is in no file, as in a notebook."""
    names: dict[str, Any] = {"__name__": "notebook", "torch": torch}
    exec(source, names)
    return names["code"]


@pytest.mark.parametrize("source", [FUNCTION, CLASS])
def test_formatting_comments_and_docstrings_do_not_count(source: str) -> None:
    again = source.replace("return ", "return    ").replace(" = ", "=").replace("Bright.", "Red.")
    again = "# a comment\n\n" + again.replace("\n", "  # and another\n", 2)
    assert code_checksum(typed(source)) == code_checksum(typed(again))
    assert code_checksum(typed(source)).startswith(SCHEME)


@pytest.mark.parametrize(
    ("source", "old", "new"),
    [
        (FUNCTION, "2.0", "3.0"),
        (FUNCTION, "(1, 2, 3)", "(1, 2)"),
        (FUNCTION, "SCALE *", "SCALE +"),
        (FUNCTION, '"b"', '"c"'),
        (FUNCTION, "else 0", "else False"),
        (FUNCTION, "prompts=None", "prompts=1"),
        (CLASS, "gain = 1.0", "gain = 2.0"),
        (CLASS, "x * self", "x + self"),
        (CLASS, "(1, 2, 3)", "(1, 2)"),
        (CLASS, "    @torch.no_grad()\n", ""),
        (CLASS, "super().__init__(config)", "super().__init__()"),
    ],
)
def test_what_changes_the_result_counts(source: str, old: str, new: str) -> None:
    assert source.count(old) == 1
    assert code_checksum(typed(source)) != code_checksum(typed(source.replace(old, new)))


def test_closures_count() -> None:
    def scaled(gain: object) -> Any:
        return lambda images: gain * images

    assert code_checksum(scaled(2)) == code_checksum(scaled(2))
    assert len({code_checksum(scaled(gain)) for gain in (2, 3, 2.0, [2], torch.nn.Linear(1, 1))}) == 5
    endless: list[Any] = []
    endless.append(endless)
    assert code_checksum(scaled(endless))


def test_every_process_computes_the_same() -> None:
    program = (
        "import sys; from alignprop_core.registry.code_checksum import code_checksum\n"
        "names = {'__name__': 'notebook'}; exec(sys.argv[1], names); print(code_checksum(names['code']))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program, FUNCTION],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert found == {code_checksum(typed(FUNCTION)) + "\n"}
