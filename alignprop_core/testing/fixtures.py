"""pytest fixtures to import by name: `from alignprop_core.testing.fixtures import temporary_plugin`.

There is no pytest entry point, so pytest loads none of them automatically.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from alignprop_core.registry import registry as registry_module
from alignprop_core.registry.registry import Registry, default_registry
from alignprop_core.testing.images import natural_images as _natural_images
from alignprop_core.testing.images import starter_images as _starter_images
from alignprop_core.testing.pipelines import TINY_PIPELINES
from alignprop_core.testing.pipelines import tiny_pipeline as _tiny_pipeline
from alignprop_core.testing.runs import train_two_steps

__all__ = [
    "isolated_registry",
    "natural_images",
    "starter_images",
    "temporary_plugin",
    "tiny_pipelines",
    "two_step_run",
]


@pytest.fixture
def isolated_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Registry]]:
    """Make registries from plain objects; discovery of installed plugins raises.

    Call it with distribution names and objects that have hooks (a module, or `SimpleNamespace`):
    `isolated_registry({"my-plugin": my_plugin})`. The registry is the default one until the end of the test.
    """

    def refuse(*_: object, **__: object) -> Iterator[Any]:
        raise AssertionError("installed plugins were looked up in a test that uses isolated_registry")

    monkeypatch.setattr(registry_module, "installed", refuse)
    default_registry.cache_clear()

    def build(plugins: dict[str, object] | None = None) -> Registry:
        made = Registry.from_plugins(plugins or {})
        monkeypatch.setattr(Registry, "discover", classmethod(lambda cls, environment=None: made))
        default_registry.cache_clear()
        return made

    yield build
    default_registry.cache_clear()


@pytest.fixture
def temporary_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Install plugins until the end of the test: real distributions with metadata, found by normal discovery.

    Call it as `temporary_plugin("my-plugin", {"my_plugin/__init__.py": source, ...})`; it returns the distribution's
    name. The entry point names the first package in `files`. Keywords: `version`, `requires` (Requires-Dist lines) and
    `license` (an SPDX expression).
    """
    site = tmp_path / "site-of-temporary-plugins"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    packages: set[str] = set()

    def install(
        distribution: str,
        files: dict[str, str],
        *,
        version: str = "0.1.0",
        requires: tuple[str, ...] = ("alignprop-core",),
        license: str = "Apache-2.0",
    ) -> str:
        for name, source in files.items():
            path = site / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source, encoding="utf-8")
        package = next(iter(files)).split("/")[0].removesuffix(".py")
        packages.update(name.split("/")[0].removesuffix(".py") for name in files)
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.4", f"Name: {distribution}", f"Version: {version}"]
        lines += [f"License-Expression: {license}"] if license else []
        lines += [f"Requires-Dist: {line}" for line in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[alignprop]\nmain = {package}\n", encoding="utf-8")
        importlib.invalidate_caches()
        default_registry.cache_clear()
        return distribution

    yield install
    default_registry.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]


@pytest.fixture(params=list(TINY_PIPELINES))
def tiny_pipelines(request: pytest.FixtureRequest) -> Any:
    """A tiny diffusers pipeline with random weights, 32x32 pixels; the test runs once for each family."""
    return _tiny_pipeline(request.param)


@pytest.fixture
def natural_images() -> Tensor:
    """Crops of photographs, (3, 3, 64, 64) float32 in [0, 1]."""
    return _natural_images()


@pytest.fixture
def starter_images() -> tuple[Tensor, list[str]]:
    """Three scenes of the starter plugin, (3, 3, 128, 128), and captions; skips without alignprop-starter."""
    pytest.importorskip("alignprop_starter", reason="starter_images needs alignprop-starter")
    return _starter_images()


@pytest.fixture
def two_step_run(tmp_path: Path) -> Callable[..., Path]:
    """Train a tiny pipeline on a reward for two steps: `two_step_run("warmth", {"margin": 0.25})` -> the run folder."""

    def run(reward: str, options: dict[str, Any] | None = None, **more: Any) -> Path:
        folder = tmp_path / "two-step-run"
        folder.mkdir()
        return train_two_steps(reward, folder, options, **more)

    return run
