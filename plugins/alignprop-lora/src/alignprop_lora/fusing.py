"""Fuse a LoRA into a pipeline's own weights, for programs without LoRA support."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignprop_core._files import cannot_write
from alignprop_core.errors import LoraError
from alignprop_core.lora.files import LoraFile
from alignprop_core.lora.layers import adaptable, fit
from alignprop_core.lora.names import DENOISER


@dataclass(frozen=True)
class Fused:
    """Result of `fuse`.

    Attributes:
        layers: number of layers whose weights changed.
        rounding_error: ||stored change - change|| / ||change|| over all layers: the effect of rounding to `dtype`.
    """

    layers: int
    rounding_error: float


@torch.no_grad()
def fuse(
    pipeline: Any,
    lora: LoraFile,
    strength: float = 1.0,
    *,
    dtype: torch.dtype = torch.float32,
    path: str | Path = "the LoRA",
) -> Fused:
    """Add a LoRA's weight change to a diffusers pipeline's weights and convert all its networks to `dtype`, in place.

    Sums in float64 and rounds once. Rounding to bfloat16 removes most of a small weight change; see
    `Fused.rounding_error`.

    Args:
        pipeline: a loaded float32 pipeline without adapters.
        lora: the LoRA to fuse.
        strength: factor on the weight change.
        dtype: dtype of all networks afterwards.
        path: name of the LoRA in error messages.

    Raises:
        LoraError: the LoRA does not fit the pipeline, which is unchanged.
    """
    if not math.isfinite(strength):
        raise LoraError(f"The LoRA strength must be a finite number, not {strength}.")
    fitted = []
    for component, factors in lora.parts.items():
        network = getattr(pipeline, lora.component if component == DENOISER else component, None)
        if not isinstance(network, nn.Module):
            raise LoraError(
                f"{path} changes the {component}, which this model does not have: it is for another kind of model."
            )
        fitted.append((adaptable(network), fit(factors, network, path)))
    total, lost, count = 0.0, 0.0, 0
    for layers, changes in fitted:
        for name, layer in changes.items():
            weight: Any = layers[name].weight
            change = strength * layer.change().to(weight.device)
            fused = (weight.double() + change).to(dtype)
            stored = fused.double() - weight.to(dtype).double()
            total += float(change.square().sum())
            lost += float((stored - change).square().sum())
            weight.copy_(fused)
            count += 1
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            nn.Module.to(component, dtype=dtype)
    return Fused(count, math.sqrt(lost / total) if total else 0.0)


def save_pipeline(pipeline: Any, folder: str | Path) -> None:
    """Write a pipeline as a diffusers folder of safetensors files, atomically.

    Raises:
        OutputError: the folder cannot be written to.
    """
    folder = Path(folder).absolute()
    building = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.to(memory_format=torch.contiguous_format)  # safetensors writes no channels-last tensors
        pipeline.save_pretrained(building, safe_serialization=True)
        os.replace(building, folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
