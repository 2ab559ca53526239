"""A loaded diffusers pipeline as the base model of a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from alignprop_core.config.sections import RunConfig
from alignprop_core.diffusion.families.base import uncompiled
from alignprop_core.diffusion.sampler import LOADED
from alignprop_core.errors import ModelError, under
from alignprop_core.locate import PASSED, find_base
from alignprop_core.lora.adapters import ADAPTER
from alignprop_core.lora.layers import adapter_names
from alignprop_core.lora.swapping import detach, parts_of
from alignprop_core.registry.registry import Registry

OWN = re.compile(rf"^({ADAPTER}|{LOADED}|frozen_\d+)$")
"""Names of the adapters that alignprop leaves on a pipeline."""


def own_adapters(pipeline: Any) -> set[str]:
    """Return the names of alignprop's adapters on a pipeline."""
    return {name for part in parts_of(pipeline) for name in adapter_names(part) if OWN.match(name)}


def detach_own(pipeline: Any) -> None:
    """Remove alignprop's adapters from a pipeline, such as those of an earlier run."""
    for name in own_adapters(pipeline):
        for part in parts_of(pipeline):
            detach(part, name)


def base_of(pipeline: Any, registry: Registry) -> str:
    """Return the `model.base` of a pipeline: what it was loaded from, or a marker if that does not load the same."""
    name = str(getattr(pipeline, "config", {}).get("_name_or_path") or "")
    others = {name for part in parts_of(pipeline) for name in adapter_names(part)} - own_adapters(pipeline)
    try:
        if name and not others:
            found = find_base(name, registry)
            return str(found.absolute()) if isinstance(found, Path) else found
    except ModelError:
        pass
    return f"{PASSED}{type(pipeline).__name__}"


def prepare(pipeline: Any, config: RunConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Move a pipeline to a run's device, freeze it, and remove compiled code and the adapters of an earlier run.

    Raises:
        ModelError: its networks have another dtype than the run, or the config has another autoencoder.
    """
    uncompiled(pipeline)
    network = getattr(pipeline, "unet", getattr(pipeline, "transformer", None))
    if network is not None and network.dtype not in (dtype, torch.float64):
        fits = {torch.float32: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}.get(network.dtype)
        raise ModelError(
            f"training.mixed_precision: is {config.training.mixed_precision}, but the pipeline's networks are "
            f"{network.dtype}. Set it to {fits}, or load the pipeline with torch_dtype={dtype}."
        )
    for name in config.model.parts:
        with under(f"model.{name}"):
            raise ModelError(f"cannot be combined with a loaded pipeline; set pipeline.{name} instead.")
    detach_own(pipeline)
    pipeline.to(device)
    for part in parts_of(pipeline):
        part.requires_grad_(False).eval()
