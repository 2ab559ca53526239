"""Against TRL 0.23.1: the same adapter gradient, its objects in `ap.train`, and a guide that covers all of its keys.

TRL is installed beside the environment, by `make build/bench/.installed`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from pydantic import BaseModel

from alignprop_core import RunConfig

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / "build" / "bench" / "bin" / "python"
SCRIPT = ROOT / "tests" / "bench" / "trl_gradient.py"
GUIDE = (ROOT / "docs" / "from-trl.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(?P<key>\w+)` \| (?P<alignprop>[^|]+) \| (?P<ddpo>[^|]+) \| (?P<ours>.+) \|$", re.MULTILINE)
"""A row of the guide's tables of keys: TRL's key, its default in each of the two configs, and the explanation."""
KEY = re.compile(r"`([a-z_]+\.[a-z_]+)(?:: [^`]+)?`")
"""A key of ours in the guide, `section.key` or `section.key: value`."""

FIELDS = """
import accelerate
accelerate.PartialState()
import dataclasses, json
from trl import AlignPropConfig, DDPOConfig
print(json.dumps({c.__name__: [f.name for f in dataclasses.fields(c)] for c in (AlignPropConfig, DDPOConfig)}))
"""

needs_trl = pytest.mark.skipif(
    not (ROOT / "build" / "bench" / ".installed").is_file(), reason="needs TRL: make build/bench/.installed"
)


def run_with_trl(*arguments: str, timeout: int) -> str:
    """Run TRL's Python; returns what it printed."""
    environment: Mapping[str, str] = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [str(PYTHON), *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the keys of a config class, sections and their keys."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys_of(field.annotation, f"{prefix}{name}.")


@needs_trl
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_adapter_gradient_equals_trls() -> None:
    """Cosine at least 0.9999 as both are, 0.999999 without the two known differences; the script exits 1 otherwise."""
    assert "the goal is at most" in run_with_trl(str(SCRIPT), "--part", "gradient", timeout=1150)


@needs_trl
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trls_pipeline_prompt_function_and_reward_train_unchanged() -> None:
    assert "trained on TRL's pipeline" in run_with_trl(str(SCRIPT), "--part", "train", timeout=550)


@needs_trl
@pytest.mark.slow
def test_the_guide_maps_every_key_of_trls_configs() -> None:
    fields = json.loads(run_with_trl("-c", FIELDS, timeout=250).splitlines()[-1])
    rows = list(ROW.finditer(GUIDE))
    for config, column in (("AlignPropConfig", "alignprop"), ("DDPOConfig", "ddpo")):
        mapped = [row["key"] for row in rows if row[column] != "-"]
        assert sorted(mapped) == sorted(fields[config]), config


def test_every_key_the_guide_names_is_a_key_of_the_run_config() -> None:
    ours = [key for row in ROW.finditer(GUIDE) for key in KEY.findall(row["ours"])]
    assert len(ours) > 20
    assert set(ours) <= set(keys_of(RunConfig))
