"""Fixtures every test may use. Where a test is no place for a fixture: `from tests.support.tiny import tiny_sd`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

INDEPENDENT = (
    "test_distributions.py",
    "test_fresh_installs.py",
    "test_example_plugins.py",
    "test_isolated_hpsv2.py",
    "test_new_reward.py",
    "test_many_plugins.py",
    "test_rewards_learn.py",
    "test_examples.py",
)
"""Files whose tests take a quarter of a minute and more each, and share no expensive fixture but the wheels."""

ONE_ENVIRONMENT = "alignprop-isolation"
"""The plugin whose test files use one Python environment: they run in one process, so that it is made once."""

TIMED = "test_listing_times.py"
"""Tests of processor time, which a busy machine inflates: they run last."""


@pytest.fixture(scope="session")
def tiny_sd() -> Callable[..., StableDiffusionPipeline]:
    """The builder of tests.support.tiny; imported late, so that tests without torch stay quick."""
    from tests.support.tiny import tiny_sd

    return tiny_sd


@pytest.fixture(scope="session")
def tiny_model(tiny_sd: Callable[..., StableDiffusionPipeline], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny pipeline, as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("tiny_model")
    tiny_sd().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The wheel of the core or of a plugin by its distribution's name; built once for all processes of the tests."""
    from tests.support.fresh import shared_wheel

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "wheels-of-ours"
    return lambda name: shared_wheel(name, folder)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a file to one process, for its fixtures' sake; long tests that share none go one by one."""
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            if ONE_ENVIRONMENT in file:
                return file.rpartition("/")[0]
            return nodeid if file.endswith(INDEPENDENT) else file

    return Files(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest tests first and the timed ones last; skip, visibly, what needs a GPU."""

    def late(item: pytest.Item) -> tuple[bool, bool, bool]:
        name, folders = item.path.name, item.path.parts
        return name == TIMED, name not in INDEPENDENT, ONE_ENVIRONMENT not in folders

    items.sort(key=late)
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
