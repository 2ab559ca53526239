"""Fixtures every test may use. Where a test is no place for a fixture: `from tests.tiny import tiny_sd`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@pytest.fixture(scope="session")
def tiny_sd() -> Callable[..., StableDiffusionPipeline]:
    """The builder of tests.tiny; imported late, so that tests without torch stay quick."""
    from tests.tiny import tiny_sd

    return tiny_sd


@pytest.fixture(scope="session")
def tiny_model(tiny_sd: Callable[..., StableDiffusionPipeline], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny pipeline, as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("tiny_model")
    tiny_sd().save_pretrained(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, visibly, what needs a GPU where there is none."""
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
