"""The example plugins install by the commands their READMEs give, outside the repository, and pass their own tests."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.support.fresh import ROOT, FreshEnvironment, build_wheel

EXAMPLES = sorted((ROOT / "examples" / "plugins").iterdir())
BLOCK = re.compile(r"^```(bash|python|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_there_are_two() -> None:
    assert [path.name for path in EXAMPLES] == ["alignprop-hf-classifier", "alignprop-mean-color"]


def test_the_mean_color_is_ten_lines() -> None:
    source = (ROOT / "examples/plugins/alignprop-mean-color/mean_color/reward.py").read_text()
    body = source.partition("class MeanColor")[2].splitlines()
    assert len([line for line in body if line.strip()]) <= 10


@pytest.mark.slow  # tests/cli/test_new_reward.py builds and installs a plugin in `make test`
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_its_readme_works_when_pasted(example: Path, tmp_path: Path) -> None:
    environment = FreshEnvironment(tmp_path / "environment")
    environment.install(build_wheel(ROOT, tmp_path))
    # A checkout with nothing but the example, so that what is tested is what was installed.
    work = tmp_path / "checkout"
    shutil.copytree(example, work / "examples" / "plugins" / example.name, ignore=shutil.ignore_patterns("__pycache__"))
    for language, text in BLOCK.findall((example / "README.md").read_text()):
        if language == "bash":
            environment.run(text, work)
        elif language == "python":
            environment.run(["python", "-c", text], work)
        else:
            run = {"model": {"base": "owner/name"}, "prompts": {"train": "p.txt"}, "output": "run"}
            (work / "p.txt").write_text("a cat\n")
            (work / "run.yaml").write_text(yaml.safe_dump({**run, **yaml.safe_load(text)}))
            environment.run(["python", "-c", "from alignprop_core import load_config; load_config('run.yaml')"], work)
    where = environment.run("pip show -f " + example.name, work).stdout
    assert str(environment.site) in where
