"""Fixtures every test may use. Where a test is no place for a fixture: `from tests.tiny import tiny_sd`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@pytest.fixture(scope="session")
def tiny_sd() -> Callable[..., StableDiffusionPipeline]:
    """The builder of tests.tiny; imported late, so that tests without torch stay quick."""
    from tests.tiny import tiny_sd

    return tiny_sd


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, visibly, what needs a GPU where there is none."""
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
