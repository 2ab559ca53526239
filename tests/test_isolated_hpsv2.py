"""The original hpsv2 package, whose pins fit no current environment, trains a run from its own environment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from alignprop_core.config.load import load_config
from alignprop_core.registry.registry import default_registry
from alignprop_core.reward import ImageBatch, Reward
from alignprop_core.training.trainer import Trainer
from alignprop_isolation.config import IsolationConfig
from alignprop_isolation.install import python_of
from alignprop_isolation.lookup import IsolatedRewards

ROOT = Path(__file__).parents[1]
ORIGINAL = ROOT / "build" / "isolated" / "hpsv2"


def scored(reward: Reward, images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
    images = images.clone().requires_grad_()
    scores = reward(ImageBatch(images=images, prompts=prompts))
    return scores.detach(), torch.autograd.grad(scores.sum(), images)[0]


@pytest.mark.slow  # an environment of its own, from the registry; plugins/alignprop-isolation/tests has the quick ones
def test_the_original_hpsv2_trains_a_run_from_its_own_environment(tiny_model: Path, tmp_path: Path) -> None:
    """hpsv2 1.2.0 with protobuf<4 and pytest==7.2.0, on the starter's small weights, against our own reward."""
    inner = python_of(ORIGINAL)
    if not inner.exists():
        pytest.fail(f"{ORIGINAL} is missing: `make test-all` creates it")
    pins = "import google.protobuf as p, hpsv2, importlib.metadata as m; print(p.__version__, m.version('pytest'))"
    protobuf, pytest_there = subprocess.check_output([inner, "-I", "-c", pins], text=True).split()
    assert protobuf.startswith("3.")
    assert pytest_there == "7.2.0" != pytest.__version__
    source = IsolatedRewards(IsolationConfig(python=str(inner)), default_registry())
    name = f"{ROOT / 'examples' / 'isolated' / 'original_hpsv2.py'}:OriginalHpsv2"
    theirs = source.load_reward(name, source.reward_options(name, {}))
    ours = default_registry().load_reward("hpsv2", {"weights": "starter"})
    images = torch.rand(3, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    prompts = ["three foxes in the snow", "a cat", ""]
    for own, other in zip(scored(ours, images, prompts), scored(theirs, images, prompts), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5 * float(own.abs().max()))
    (tmp_path / "prompts.txt").write_text("a fox\nan owl\n")
    data = {
        "model": {"base": str(tiny_model)},
        "prompts": {"train": "./prompts.txt", "heldout": "./prompts.txt"},
        "sampling": {"steps": 2, "guidance_scale": 1.0},
        "rewards": [{"name": name, "isolation": {"python": str(inner)}}, {"name": "jpeg_compressibility"}],
        "mix": {"combine": "balanced"},
        "training": {"steps": 2, "batch_size": 2, "device": "cpu"},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(data))
    Trainer(load_config(tmp_path / "run.yaml")).train()
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(step["terms"]["original_hpsv2"]["grad_norm"] > 0 for step in steps)
    assert "hpsv2" not in sys.modules
