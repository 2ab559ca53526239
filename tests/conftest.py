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
