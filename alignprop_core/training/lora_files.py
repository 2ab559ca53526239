"""A run's LoRA files: their names, and header metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from alignprop_core._files import safe_name
from alignprop_core.lora import adapters
from alignprop_core.lora.files import FORMATS
from alignprop_core.registry.local import public_name

if TYPE_CHECKING:
    from alignprop_core.training.trainer import Trainer


def lora_name(folder: Path) -> str:
    """Return the name of a run's LoRA: its folder's, as a plain file name that is not diffusers' own."""
    name = safe_name(folder.name)
    return f"{name}_kohya" if name.endswith("pytorch_lora_weights") else name


def save_lora(
    trainer: Trainer,
    folder: str = "lora",
    *,
    suffix: str = "",
    step: int | None = None,
    formats: tuple[str, ...] = FORMATS,
) -> None:
    """Write the adapters as they are now into a folder of the run.

    Args:
        trainer: the trainer; its run folder is open.
        folder: folder inside the run folder.
        suffix: end of the name of the file in kohya's layout.
        step: step of the adapters; `trainer.saved_step` if None.
        formats: "diffusers", "kohya" or both.
    """
    name = lora_name(trainer.folder.path)
    # Without the folders of a Python file: a published LoRA should not reveal its author's paths.
    rewards = [{"name": public_name(term.name), "weight": term.weight} for term in trainer.config.rewards]
    metadata = {
        "modelspec.title": name,
        "alignprop.base_model": trainer.config.model.base,
        "alignprop.step": str(trainer.saved_step if step is None else step),
        "alignprop.rewards": json.dumps(rewards),
    }
    adapters.save(
        trainer.denoiser,
        trainer.folder.inside(folder, name).parent,
        name=name + suffix,
        metadata=metadata,
        component=trainer.denoiser_name,
        formats=formats,
    )
