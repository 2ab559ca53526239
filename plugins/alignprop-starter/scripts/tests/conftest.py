"""Makes the scripts importable; the fixture `pipe` is the shipped base model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from alignprop_starter import model_folder

sys.path.insert(0, str(Path(__file__).parents[1]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The quality of the shipped weights and the scripts that made them rarely change: slow."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def pipe() -> Any:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model_folder())
    pipe.set_progress_bar_config(disable=True)
    return pipe
