"""What `sample` and `evaluate` share: a model by name, with a LoRA, as a sampler."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from alignprop_core import lora
from alignprop_core.config.model import ModelLora, SamplingConfig
from alignprop_core.devices import network_dtype
from alignprop_core.diffusion.families.find import family_for
from alignprop_core.diffusion.loading import load_pipeline
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.registry.registry import Registry

TRAINED = "lora"
"""Name of the adapter that holds the LoRA under test."""


def open_sampler(
    model: str,
    sampling: SamplingConfig,
    *,
    device: torch.device,
    registry: Registry,
    lora_path: Path | None,
    strength: float = 1.0,
    mixed_precision: Literal["no", "fp16", "bf16"] = "no",
    vae: str | None = None,
    frozen: Sequence[ModelLora] = (),
) -> Sampler:
    """Load a model, apply a LoRA (a folder, a file or a run folder), and return a sampler.

    `frozen` are LoRAs of the base model, applied first and not counted to the one under test.

    Raises:
        UserError: model or LoRA cannot be had, or the device does not know the number format.
    """
    dtype = network_dtype(mixed_precision, device)
    pipeline = load_pipeline(model, registry=registry, device=device, dtype=dtype, vae=vae)
    for number, extra in enumerate(frozen):
        lora.attach_frozen(pipeline, extra.path, extra.strength, f"frozen_{number}")
    if lora_path is not None:
        lora.attach_frozen(pipeline, lora_path, strength, TRAINED)
    family = family_for(pipeline, sampling, [offer.spec for offer in registry.families()])
    return Sampler(pipeline, sampling, family=family)
