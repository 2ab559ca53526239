"""Names and header metadata of a run's LoRA files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from alignprop_core._files import safe_name
from alignprop_core.registry.local import public_name

if TYPE_CHECKING:
    from alignprop_core.training.trainer import Trainer


def lora_name(folder: Path) -> str:
    """Return the name of a run's LoRA: its folder's, as a plain file name that is not diffusers' own."""
    name = safe_name(folder.name)
    return f"{name}_kohya" if name.endswith("pytorch_lora_weights") else name


def lora_metadata(trainer: Trainer) -> dict[str, str]:
    """Return the header metadata of the run's LoRA files."""
    # Without the folders of a Python file: a published LoRA should not reveal its author's paths.
    rewards = [{"name": public_name(term.name), "weight": term.weight} for term in trainer.config.rewards]
    return {
        "modelspec.title": lora_name(trainer.folder.path),
        "alignprop.base_model": trainer.config.model.base,
        "alignprop.step": str(trainer.saved_step),
        "alignprop.rewards": json.dumps(rewards),
    }
