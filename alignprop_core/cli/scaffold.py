"""Filling in the templates of `alignprop rewards new`. No torch.

A template is a text file with `<<values>>` and blocks from a line `%% if FLAG` (or `%% if not FLAG`) to `%% end`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date
from importlib.resources import files
from typing import Any

from alignprop_core import __version__
from alignprop_core.specs import API_VERSION

LICENSES = ("Apache-2.0", "MIT", "BSD-3-Clause")

_FILES = {
    "pyproject.toml": "pyproject.toml.tmpl",
    "README.md": "README.md.tmpl",
    ".gitignore": "gitignore.tmpl",
    ".github/workflows/tests.yml": "ci.yml.tmpl",
    "src/{package}/__init__.py": "src/__init__.py.tmpl",
    "src/{package}/config.py": "src/config.py.tmpl",
    "src/{package}/reward.py": "src/reward.py.tmpl",
    "tests/test_conformance.py": "tests/test_conformance.py.tmpl",
    "tests/test_reward.py": "tests/test_reward.py.tmpl",
}


def render(text: str, values: Mapping[str, str], flags: Mapping[str, bool]) -> str:
    """Fill in a template; blocks may stand inside one another. `KeyError` for a value or flag it does not know."""
    lines: list[str] = []
    shown = [True]
    for line in text.splitlines():
        if block := re.fullmatch(r"%% if (not )?(\w+)", line):
            shown.append(shown[-1] and flags[block[2]] is not bool(block[1]))
        elif line == "%% end":
            shown.pop()
        elif shown[-1]:
            lines.append(re.sub(r"<<(\w+)>>", lambda found: values[found[1]], line))
    return "\n".join(lines) + "\n"


def reward_project(name: str, *, prompts: bool, weights: bool, license: str, author: str = "") -> dict[str, bytes]:
    """Return a complete plugin with one reward, by path inside its folder.

    Args:
        name: the reward's name, snake_case.
        prompts: whether it reads prompts.
        weights: whether it has a network with weights.
        license: one of `LICENSES`.
        author: who stands in the metadata, and in a licence that names somebody; "the authors of DISTRIBUTION" stand
            there if empty.
    """
    major, minor = (int(part) for part in __version__.split(".")[:2])
    distribution = "alignprop-" + name.replace("_", "-")
    values = {
        "name": name,
        "distribution": distribution,
        "package": f"alignprop_{name}",
        "Class": "".join(part.title() for part in name.split("_")),
        "summary": "The mean colour is near the one "
        + ("the prompt names" if prompts else "wished for")
        + (", and a small network likes it." if weights else "."),
        "license": license,
        "author": author or f"the authors of {distribution}",
        "quoted_author": json.dumps(author, ensure_ascii=False),  # a JSON string is a TOML string
        "year": str(date.today().year),
        "high": "1.0" if weights else "0.0",
        "core_from": f"{major}.{minor}",
        # Before 1.0 a minor version may change the contract, from then on only a major one.
        "core_below": f"{major}.{minor + 1}" if major == 0 else f"{major + 1}",
        "api_version": str(API_VERSION),
    }
    flags = {"prompts": prompts, "weights": weights, "author": bool(author)}
    root = files("alignprop_core").joinpath("templates/reward")

    def filled(template: str) -> bytes:
        return render(root.joinpath(template).read_text(encoding="utf-8"), values, flags).encode()

    made = {path.format(package=values["package"]): filled(template) for path, template in _FILES.items()}
    made["LICENSE"] = filled(f"licenses/{license}.txt")
    made[f"src/{values['package']}/py.typed"] = b""
    if weights:
        made[f"src/{values['package']}/weights/example.safetensors"] = _example_weights()
    return made


def _example_weights() -> bytes:
    """Return random weights of the template's network, the same every time."""
    import numpy as np
    from safetensors.numpy import save

    g = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "0.weight": (8, 3, 1, 1), "0.bias": (8,), "2.weight": (1, 8, 1, 1), "2.bias": (1,)
    }  # fmt: skip
    state: dict[str, Any] = {key: g.normal(0, 0.3, shape).astype(np.float32) for key, shape in shapes.items()}
    data: bytes = save(state)
    return data
