"""What the pages for plugin authors and readers promise: every hook is documented, every reward is in the gallery."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import tomllib
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from alignprop_core import specs, testing, weights
from alignprop_core.registry.discovery import SPEC_OF_HOOK
from alignprop_core.registry.registry import default_registry
from alignprop_core.testing import fixtures
from alignprop_template.scaffold import reward_project

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PROJECTS = sorted(
    path
    for path in [*ROOT.glob("plugins/*/pyproject.toml"), *ROOT.glob("examples/plugins/*/pyproject.toml")]
    if "[project.entry-points.alignprop]" in path.read_text(encoding="utf-8")
)
REFERENCE = (DOCS / "plugin-reference.md").read_text(encoding="utf-8")


@cache
def gallery() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_gallery", ROOT / "tools" / "docs" / "gallery.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


# -- plugins ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("project", PROJECTS, ids=lambda path: path.parent.name)
def test_a_plugin_can_be_found_and_says_its_licence(project: Path) -> None:
    facts = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    assert "alignprop-plugin" in facts["keywords"]
    assert facts["license"]
    assert facts["description"]
    assert facts["name"] == project.parent.name
    assert f"[{facts['name']}](" in (DOCS / "plugins.md").read_text(encoding="utf-8")


def test_every_field_of_a_spec_is_described() -> None:
    kinds = [*SPEC_OF_HOOK.values(), specs.WeightsFile]
    silent = [f"{kind.__name__}.{name}" for kind in kinds for name, f in kind.model_fields.items() if not f.description]
    assert not silent


# -- the reference ----------------------------------------------------------------------------------------------------


def test_every_hook_spec_check_and_helper_is_in_the_reference() -> None:
    names = {*SPEC_OF_HOOK, *testing.__all__, *fixtures.__all__, *(kind.__name__ for kind in SPEC_OF_HOOK.values())}
    names |= {"Reward", "ImageBatch", "RewardConfig", "Family", "WeightsFile", "image_features"}
    # What only commands need: a hub address taken apart, a file checked after a download.
    names |= set(weights.__all__) - {"parse_hub_file", "verify"}
    # A generated table names every check.
    names -= {"CHECKS"}
    assert not [name for name in names if not re.search(rf"\b{name}\b", REFERENCE)]


# -- the guide --------------------------------------------------------------------------------------------------------


def test_the_guides_excerpts_are_what_the_template_writes() -> None:
    guide = (DOCS / "write-a-reward.md").read_text(encoding="utf-8")
    assert f"({len(testing.CHECKS)} checks:" in guide
    section = guide.partition("\n## Weights\n")[2].partition("\n## ")[0]
    assert "alignprop rewards new taste --prompts --weights --license MIT" in section
    project = reward_project("taste", prompts=True, weights=True, license="MIT")
    written = {
        line.strip() for path, data in project.items() if path.endswith(".py") for line in data.decode().split("\n")
    }
    excerpts = re.findall(r"^```python \{\.not-run\}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert len(excerpts) == 2
    assert not [line for text in excerpts for line in text.splitlines() if line.strip() not in written]


def test_the_guides_excerpts_are_python() -> None:
    guide = (DOCS / "write-a-reward.md").read_text(encoding="utf-8")
    for text in re.findall(r"^```python.*?\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL):
        ast.parse(text)


# -- the gallery ------------------------------------------------------------------------------------------------------


def test_every_shipped_reward_with_a_gradient_is_in_the_gallery() -> None:
    own = {path.parent.name for path in PROJECTS}
    shipped = [o.spec.name for o in default_registry().rewards() if o.distribution in own and o.spec.differentiable]
    assert sorted(shipped) == list(gallery().REWARDS)
    page = (DOCS / "gallery.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == sorted(shipped)


def test_the_gallerys_scores_are_in_order_and_its_pictures_are_small() -> None:
    page = (DOCS / "gallery.md").read_text(encoding="utf-8")
    for part in page.split("\n## ")[1:]:
        scores = [float(score) for score in re.findall(r"\*\*(-?[\d.e-]+)\*\*", part)]
        assert len(scores) == 2 * gallery().ENDS
        assert scores == sorted(scores)
        assert scores[0] < scores[-1]
    shown = set(re.findall(r"\((images/gallery/\d+\.webp)\)", page))
    files = sorted((DOCS / "images" / "gallery").iterdir())
    assert shown == {str(file.relative_to(DOCS)) for file in files}
    assert sum(file.stat().st_size for file in files) < 400_000
    for file in files:
        with Image.open(file) as picture:
            assert (picture.format, picture.size) == ("WEBP", (128, 128))
