"""The documentation is true: every fenced block of README.md, CONTRIBUTING.md and docs/ is run or checked.

A page's blocks run in order in a folder of their own. A block with a `title` is a file that is written there; `bash`
and `python` blocks without one run; `yaml` blocks are run configs, or parts of one, and must be valid. A block marked
`{.not-run}` would need a network, a GPU or minutes: of those, `make` targets must exist and run configs must load.
Training is cut down to one tiny step, nothing else is changed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignprop_core.config.load import load_config
from alignprop_core.registry.registry import default_registry

ROOT = Path(__file__).parents[1]
# docs/results/ records what long commands gave; those commands are no part of the tests.
PAGES = [path for path in sorted((ROOT / "docs").rglob("*.md")) if path.parent.name != "results"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
FENCE = re.compile(r'^```(?P<language>\w*) *(?:\{(?P<mark>[^}]*)\})? *(?:title="(?P<title>[^"]+)")?$')
LANGUAGES = {"bash", "python", "yaml", "toml", "json", "jsonl", "text"}
TINY = ["training.steps=1", "training.batch_size=1", "sampling.steps=2", "previews.seeds=[0]"]
TINY += ["evaluation.images_per_prompt=1"]
ALIGNPROP = f"""
from alignprop_core.cli import main
if sys.argv[1:2] == ["train"]:
    sys.argv += {TINY}
main()
"""
PIP = """
from pip._internal.cli.main import main
sys.argv[2:2] = ["--quiet", "--no-index", "--no-build-isolation"]
sys.exit(main())
"""


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    line: int
    language: str
    not_run: bool
    title: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """Yield a page's blocks; a fence this does not understand is an error."""
    lines = page.read_text(encoding="utf-8").splitlines()
    name = str(page.relative_to(ROOT))
    start: tuple[int, re.Match[str]] | None = None
    for number, line in enumerate(lines, 1):
        if not line.startswith("```"):
            continue
        if start is None:
            fence = FENCE.match(line)
            assert fence, f"{name}:{number}: a fence this test does not understand: {line}"
            start = (number, fence)
        else:
            first, fence = start
            mark = fence["mark"] or ""
            assert fence["language"] in LANGUAGES, f"{name}:{first}: say the block's language"
            assert mark in ("", ".not-run"), f"{name}:{first}: unknown mark {mark}"
            text = "\n".join(lines[first : number - 1]) + "\n"
            yield Block(name, first, fence["language"], mark == ".not-run", fence["title"], text)
            start = None
    assert start is None, f"{name}: a block is not closed"


def pages_that_run() -> Iterator[object]:
    """Yield the pages with something to run; those that train are slow."""
    for page in PAGES:
        code = [b.text for b in blocks_of(page) if b.language in ("bash", "python") and not b.not_run]
        slow = any(re.search(r"alignprop (train|sample|evaluate|demo)|Trainer\(|\btrain\(", text) for text in code)
        if code:
            yield pytest.param(page, id=page.name, marks=[pytest.mark.slow] if slow else [])


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A virtual environment on top of this one, so that what a page installs stays out of it; returns variables.

    Its `pip` works offline, and its `alignprop train` trains one tiny step.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    own = next((folder / "lib").glob("python3*")) / "site-packages"
    above = [path for path in sys.path if path.endswith("site-packages")]
    (own / "above.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in above))
    for name, code in (("alignprop", ALIGNPROP), ("pip", PIP)):
        (folder / "bin" / name).write_text(f"#!{folder / 'bin' / 'python'}\nimport sys\n{code}")
        (folder / "bin" / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": str(folder),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "NO_COLOR": "1",
    }


@pytest.mark.parametrize("page", list(pages_that_run()))
def test_a_page_works_when_pasted(page: Path, environment: dict[str, str], tmp_path: Path) -> None:
    for block in blocks_of(page):
        if block.title:
            path = tmp_path / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        elif block.language in ("bash", "python") and not block.not_run:
            program = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else ["python", "-c"]
            done = subprocess.run(
                [*program, block.text], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
            )
            assert done.returncode == 0, f"{block}\n{block.text}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=str)
def test_a_yaml_block_is_a_valid_run_config(block: Block) -> None:
    base: dict[str, Any] = {
        "model": {"base": "owner/name"},
        "prompts": {"train": "prompts.txt"},
        "rewards": [{"name": "jpeg_compressibility"}],
        "output": "run",
    }
    registry = default_registry()
    data = {**base, **yaml.safe_load(block.text)}
    # A reward that a page itself writes is checked where the page runs.
    known = {offer.spec.name for offer in registry.rewards()}
    data["rewards"] = [term for term in data["rewards"] if term["name"] in known] or base["rewards"]
    # So is an environment that a page makes.
    for term in data["rewards"]:
        term.pop("isolation", None)
    load_config(data, registry=registry)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "bash" and b.not_run], ids=str)
def test_make_targets_in_the_docs_exist(block: Block) -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)", block.text, re.MULTILINE)) <= targets


def test_the_generated_parts_are_current() -> None:
    check = [sys.executable, str(ROOT / "tools" / "docs" / "generate.py"), "--check"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    mkdocs = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        mkdocs, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
