"""What `sample` and `evaluate` share: a model by name, with a LoRA, as a sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from alignprop_core import lora
from alignprop_core.config import ModelLora, SamplingConfig
from alignprop_core.diffusion import Sampler, family_for, load_pipeline
from alignprop_core.errors import UserError
from alignprop_core.registry import Registry, default_registry
from alignprop_core.training.devices import choose_device, network_dtype

TRAINED = "lora"
"""Name of the adapter that holds the LoRA under test."""


def open_sampler(
    model: str,
    sampling: Mapping[str, Any],
    *,
    lora_path: Path | None,
    strength: float = 1.0,
    device: str = "auto",
    mixed_precision: Literal["no", "fp16", "bf16"] = "no",
    registry: Registry | None = None,
    vae: str | None = None,
    frozen: Sequence[ModelLora] = (),
) -> Sampler:
    """Load a model, apply a LoRA (a folder, a file or a run folder), and return a sampler.

    `frozen` are LoRAs of the base model, applied first and not counted to the one under test.

    Raises:
        UserError: a value is out of range, or model, LoRA or device cannot be had.
    """
    registry = registry or default_registry()
    try:
        settings = SamplingConfig(**sampling)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"These sampling settings are not possible: {problems}.") from error
    where = choose_device(device)
    dtype = network_dtype(mixed_precision, where)
    pipeline = load_pipeline(model, registry=registry, device=where, dtype=dtype, vae=vae)
    for number, extra in enumerate(frozen):
        lora.attach_frozen(pipeline, extra.path, extra.strength, f"frozen_{number}")
    if lora_path is not None:
        inside = lora_path / "lora"
        lora.attach_frozen(pipeline, inside if inside.is_dir() else lora_path, strength, TRAINED)
    family = family_for(pipeline, settings, [offer.spec for offer in registry.families()])
    return Sampler(pipeline, settings, family=family)
