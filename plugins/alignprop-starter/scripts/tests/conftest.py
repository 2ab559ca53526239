"""Makes the scripts importable; the fixture `pipe` is the shipped base model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from alignprop_starter import model_folder

sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture(scope="session")
def pipe() -> Any:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model_folder())
    pipe.set_progress_bar_config(disable=True)
    return pipe
