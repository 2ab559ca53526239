"""An environment with a package that this one lacks, rewards that need it, and runs of a tiny model."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from alignprop_core.cli import run
from alignprop_core.config.load import load_config
from alignprop_core.registry.registry import Registry
from alignprop_core.reward import ImageBatch, Reward
from alignprop_core.testing.pipelines import tiny_pipeline
from alignprop_isolation.config import IsolationConfig
from alignprop_isolation.install import python_of
from alignprop_isolation.lookup import IsolatedRewards
from alignprop_isolation.reward import IsolatedReward

FILE = '''\
"""Rewards that only work where only_there is installed."""

import os
import sys
import time
from pathlib import Path

import only_there
import torch
from pydantic import Field

from alignprop_core import ImageBatch, Reward, RewardConfig
from alignprop_core.errors import PromptError


class Options(RewardConfig):
    gain: float = Field(default=only_there.GAIN, gt=0, description="Factor.")
    does: str = Field(default="", description="What else it does.")
    folder: str = Field(default="", description="Where it leaves a mark that it has scored.")


class Redness(Reward):
    """Red images."""

    Config = Options

    def check_prompt(self, prompt, metadata):
        if self.config.does == "read" and not any(character.isdigit() for character in prompt):
            raise PromptError(f'The prompt "{prompt}" has no number.')

    def score(self, batch):
        does, known = self.config.does, False
        if self.config.folder:
            mark = Path(self.config.folder) / str(os.getppid())
            known = mark.exists()
            mark.touch()
        if does == "crash" or (does == "crash once" and not known) or (does == "crash in batches" and len(batch) > 1):
            print("my last output", file=sys.stderr, flush=True)
            os._exit(7)
        if does == "raise":
            raise ValueError("three is one too many")
        if does == "sleep":
            time.sleep(60)
        if does == "grow":
            self.kept = [torch.ones(2**28) for _ in range(4)]
            time.sleep(20)
        red, green, blue = batch.images.mean((2, 3)).unbind(1)
        scores = (self.config.gain * (red - (green + blue) / 2) + 0.1 * (batch.images ** 2).mean((1, 2, 3))).to(
            torch.float64 if batch.images.dtype == torch.float64 else torch.float32
        )
        return scores.detach() if does == "detach" else scores


class Prompted(Redness):
    def score(self, batch):
        if "" in batch.prompts:
            raise PromptError("the prompt is empty.")
        more = [len(p) + m.get("number", 0) for p, m in zip(batch.prompts, batch.metadata)]
        return super().score(batch) + torch.tensor(more)


class PrintsAndWrites(Redness):
    def score(self, batch):
        print("a line on standard output")
        os.write(1, b"and one from C\\n")
        scores = super().score(batch)
        with torch.no_grad():
            batch.images.zero_()
        return scores


class Measure(Redness):
    differentiable = False

    def score(self, batch):
        return super().score(batch).detach()


class Unbuilt(Redness):
    def __init__(self, config=None):
        super().__init__(config)
        raise OSError("no such weights")
'''


@pytest.fixture(scope="session")
def isolated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which `alignprop rewards isolate` made the environment `own` for a class in a file, and its output.

    Making an environment takes eight seconds, so it is the one that all tests use.
    """
    folder = tmp_path_factory.mktemp("environments")
    (folder / "mine.py").write_text(
        "from alignprop_core import Reward\n\n\nclass Mine(Reward):\n"
        "    def score(self, batch):\n        return batch.images.mean((1, 2, 3))\n"
    )
    printed = StringIO()
    with chdir(folder), redirect_stdout(printed):
        assert run(["rewards", "isolate", "./mine.py:Mine", "--share", "--into", "own"]) == 0
    return folder, printed.getvalue()


@pytest.fixture(scope="session")
def python(isolated: tuple[Path, str]) -> Path:
    """The Python interpreter of an environment that has a package this one lacks."""
    inner = python_of(isolated[0] / "own")
    paths = subprocess.check_output([inner, "-c", "import json, sysconfig; print(json.dumps(sysconfig.get_paths()))"])
    (Path(json.loads(paths)["purelib"]) / "only_there.py").write_text("GAIN = 2.0\n")
    return inner


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python file with rewards; one for all tests, as the descriptions of its classes are cached by path."""
    path = tmp_path_factory.mktemp("rewards") / "elsewhere.py"
    path.write_text(FILE)
    return path


@pytest.fixture(scope="session")
def rewards_of() -> Callable[..., IsolatedRewards]:
    """The rewards of an environment: `rewards_of(python, timeout=1.0)`; `registry` has the license policy."""

    def rewards_of(python: str | Path, *, registry: Registry | None = None, **more: Any) -> IsolatedRewards:
        return IsolatedRewards(IsolationConfig(python=str(python), **more), registry or Registry([]))

    return rewards_of


Load = Callable[..., IsolatedReward]


def loader(python: Path, file: Path, rewards_of: Callable[..., IsolatedRewards], made: list[IsolatedReward]) -> Load:
    """Return a function that loads a reward, or a class of `file`, in that environment."""

    def load(name: str, options: dict[str, Any] | None = None, **isolation: Any) -> IsolatedReward:
        name = f"{file}:{name}" if name[0].isupper() else name
        reward = rewards_of(python, **isolation).load_reward(name, options)
        assert isinstance(reward, IsolatedReward)
        made.append(reward)
        return reward

    return load


@pytest.fixture
def load(python: Path, file: Path, rewards_of: Callable[..., IsolatedRewards]) -> Iterator[Load]:
    """Load a reward, or a class of `file`, in a worker of its own, which is closed when the test ends."""
    made: list[IsolatedReward] = []
    yield loader(python, file, rewards_of, made)
    for reward in made:
        reward.close()


@pytest.fixture(scope="session")
def load_once(python: Path, file: Path, rewards_of: Callable[..., IsolatedRewards]) -> Iterator[Load]:
    """As `load`, but with a worker that several tests use."""
    made: list[IsolatedReward] = []
    load = loader(python, file, rewards_of, made)
    known: dict[str, IsolatedReward] = {}

    def load_once(name: str, options: dict[str, Any] | None = None) -> IsolatedReward:
        key = f"{name} {options}"
        if key not in known:
            known[key] = load(name, options)
        return known[key]

    yield load_once
    for reward in made:
        reward.close()


@pytest.fixture
def images() -> Callable[..., Tensor]:
    """Random images: `images(size=3, dtype=torch.float32, side=16)`, always the same."""

    def images(size: int = 3, dtype: torch.dtype = torch.float32, side: int = 16) -> Tensor:
        return torch.rand(size, 3, side, side + 1, generator=torch.Generator().manual_seed(1)).to(dtype)

    return images


@pytest.fixture
def scored() -> Callable[..., tuple[Tensor, Tensor]]:
    """Scores and the gradient of their weighted sum: `scored(reward, images, weights)`."""

    def scored(reward: Reward, images: Tensor, weights: Tensor | None = None, **more: Any) -> tuple[Tensor, Tensor]:
        images = images.clone().requires_grad_()
        scores = reward(ImageBatch(images=images, **more))
        (gradient,) = torch.autograd.grad(scores, images, torch.ones_like(scores) if weights is None else weights)
        return scores.detach(), gradient

    return scored


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny pipeline."""
    folder = tmp_path_factory.mktemp("tiny_model")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def config_file(tmp_path: Path, tiny_model: Path) -> Callable[..., Path]:
    """Write a run config: `config_file(entry, another, mix={...})`."""

    def config_file(*rewards: Mapping[str, Any], **more: Any) -> Path:
        (tmp_path / "prompts.txt").write_text("a fox\nan owl\n")
        data = {
            "model": {"base": str(tiny_model)},
            "prompts": {"train": "./prompts.txt", "heldout": "./prompts.txt"},
            "sampling": {"steps": 2, "guidance_scale": 1.0},
            "rewards": list(rewards),
            "training": {"steps": 2, "batch_size": 2, "device": "cpu"},
            "output": str(tmp_path / "run"),
            **more,
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    return config_file


@pytest.fixture
def train() -> Callable[..., Path]:
    """Train a run config and return the run folder."""
    from alignprop_core.training.trainer import Trainer

    def train(path: Path, overrides: Sequence[str] = ()) -> Path:
        config = load_config(path, overrides)
        Trainer(config).train()
        return Path(config.output)

    return train
