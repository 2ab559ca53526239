"""A run's LoRA files: their names, and header metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from alignprop_core._files import safe_name
from alignprop_core.images import thumbnail_uri, to_pil
from alignprop_core.lora import adapters
from alignprop_core.lora.files import FORMATS
from alignprop_core.registry.local import public_name

if TYPE_CHECKING:
    from torch import Tensor

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
    name, sampling = lora_name(trainer.folder.path), trainer.config.sampling
    # Without the folders of a Python file: a published LoRA should not reveal its author's paths.
    rewards = [{"name": public_name(term.name), "weight": term.weight} for term in trainer.config.rewards]
    metadata = {
        "modelspec.title": name,
        "alignprop.base_model": trainer.config.model.base,
        "alignprop.step": str(trainer.saved_step if step is None else step),
        "alignprop.rewards": json.dumps(rewards),
        "modelspec.usage_hint": f"Trained with {sampling.steps} denoising steps and a guidance scale of "
        f"{sampling.guidance_scale:g}. A strength below 1 changes less; no trigger word.",
        **({} if trainer.preview is None else _picture(trainer.preview)),
    }
    adapters.save(
        trainer.denoiser,
        trainer.folder.inside(folder, name).parent,
        name=name + suffix,
        metadata=metadata,
        component=trainer.denoiser_name,
        formats=formats,
    )


def _picture(preview: Tensor) -> dict[str, str]:
    """Return the header entries for a preview, (3, H, W) in [0, 1]: its size, and a thumbnail that file lists show."""
    image = to_pil(preview)
    return {"modelspec.resolution": f"{image.width}x{image.height}", "modelspec.thumbnail": thumbnail_uri(image)}
