"""Fill in the templates of `alignprop rewards new`. Imports no torch.

A template is a text file with `<<values>>` and blocks from a line `%% if FLAG` (or `%% if not FLAG`) to `%% end`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date
from importlib.resources import files

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
    """Fill in a template; blocks can be nested. Raises `KeyError` for an unknown value or flag."""
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
    """Return the files of a complete plugin with one reward: path -> content.

    Args:
        name: the reward's name, snake_case.
        prompts: whether it reads prompts.
        weights: whether it has a network with weights.
        license: one of `LICENSES`.
        author: author in the metadata and the license; if empty, the license names "the authors of DISTRIBUTION".
    """
    major, minor = (int(part) for part in __version__.split(".")[:2])
    distribution = "alignprop-" + name.replace("_", "-")
    values = {
        "name": name,
        "distribution": distribution,
        "package": f"alignprop_{name}",
        "Class": "".join(part.title() for part in name.split("_")),
        "summary": "Mean color close to "
        + ("the color in the prompt" if prompts else "a target color")
        + (", plus the mean output of a small network." if weights else "."),
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
    root = files("alignprop_template").joinpath("reward")

    def filled(template: str) -> bytes:
        return render(root.joinpath(template).read_text(encoding="utf-8"), values, flags).encode()

    made = {path.format(package=values["package"]): filled(template) for path, template in _FILES.items()}
    made["LICENSE"] = filled(f"licenses/{license}.txt")
    made[f"src/{values['package']}/py.typed"] = b""
    if weights:
        made[f"src/{values['package']}/weights/example.safetensors"] = root.joinpath("example.safetensors").read_bytes()
    return made
