"""The architecture: layers import downwards only, listings import no torch, and the core stays small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.structure import (
    BLIND,
    CORE,
    LAYERS,
    LIMITS,
    counts,
    cycles,
    imports,
    layer_of,
    modules,
    step_counts,
)

MODULES = modules()


def test_every_module_belongs_to_a_layer() -> None:
    assert {layer_of(path) for path in MODULES} == set(LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(CORE)))
def test_a_layer_imports_only_layers_below_it(path: Path) -> None:
    layer = layer_of(path)
    for other in imports(path):
        assert LAYERS.index(other) <= LAYERS.index(layer), f"{layer} imports {other}, which is above it"
        assert other not in BLIND.get(layer, set()), f"{layer} must not know {other}"


def test_no_two_layers_import_each_other() -> None:
    assert list(cycles()) == []


def test_the_core_stays_small() -> None:
    found = counts() | step_counts()
    assert {name: found[name] for name, limit in LIMITS.items() if found[name] > limit} == {}


def test_package_inits_are_lazy_or_empty() -> None:
    """Importing any package of the core, with all its torch-free modules, imports no torch."""
    packages = [path.parent for path in CORE.glob("*/__init__.py") if path.parent.name != "testing"]
    names = ", ".join(f"alignprop_core.{package.name}" for package in packages)
    free = "alignprop_core.training.preflight, alignprop_core.training.resume, alignprop_core.evaluation.measures"
    code = f"import sys, alignprop_core, {names}, {free}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_core_names_no_reward() -> None:
    """The core knows no reward by name: those are for plugins, configs and docs."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in {"jpeg_compressibility", "jpeg_incompressibility", "jpeg_bytes"}, path


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, alignprop_core, alignprop_core.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
