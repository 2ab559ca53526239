"""The architecture holds: a room imports only rooms below it, and the light ones import no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

CORE = Path(__file__).parents[1] / "alignprop_core"

# Ground floor first. Modules in one row belong together.
ROOMS = [
    {"errors", "licenses", "pictures", "_files", "_forwards", "_lock"},
    {"specs"},
    {"hookspecs"},
    {"weights"},
    {"reward"},
    # Pure descriptions: sections of the config and how a wrong value reads; the registry checks options with them.
    {
        "config_base",
        "config_model",
        "config_rewards",
        "config_sections",
        "config_errors",
        "config_yaml",
        "other_trainers",
    },
    {"plugin_guard", "offers", "discovery", "local_rewards", "registry", "isolation"},
    {"config", "config_input", "config_schema", "measured", "prompts", "model_files", "devices"},
    {"mix", "terms"},
    {"lora"},
    {"diffusion"},
    {"metrics", "environment", "runs", "resume", "preflight"},
    {"evaluation"},
    {"training"},
    {"testing"},
    {"cli"},
]
FLOOR = {name: number for number, row in enumerate(ROOMS) for name in row}
# What a room must not know though it stands below: sampling and scoring meet in training only.
BLIND = {"diffusion": {"reward", "mix", "terms", "training"}, "reward": {"diffusion"}, "mix": {"diffusion"}}


def room_of(path: Path) -> str:
    return path.relative_to(CORE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Return the rooms a module imports at run time, wherever in the file the import stands."""
    found = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "alignprop_core":
            found |= {alias.name for alias in node.names} & FLOOR.keys()
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("alignprop_core."):
            found.add((node.module or "").split(".")[1])
    return found


MODULES = sorted(path for path in CORE.rglob("*.py") if path != CORE / "__init__.py")


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in MODULES} == FLOOR.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(CORE)))
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    room = room_of(path)
    for other in imports(path):
        assert FLOOR[other] <= FLOOR[room], f"{room} imports {other}, which stands above it"
        assert other not in BLIND.get(room, set()), f"{room} must not know {other}"


def test_the_core_names_no_reward() -> None:
    """The core knows no reward by name: those are for plugins, configs and docs."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in {"jpeg_compressibility", "jpeg_incompressibility", "jpeg_bytes"}, path


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, alignprop_core, alignprop_core.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
