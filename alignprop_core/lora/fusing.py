"""Bake a LoRA into a pipeline's own weights, for programs that know nothing of adapters."""

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
from alignprop_core.lora.formats import DENOISER
from alignprop_core.lora.layers import adaptable, fit
from alignprop_core.lora.whole import WholeLora


@dataclass(frozen=True)
class Baked:
    """What baking did.

    Attributes:
        layers: layers whose weights changed.
        lost: ||change that arrived - change|| / ||change|| over all of them: what rounding to the weights' format took.
    """

    layers: int
    lost: float


@torch.no_grad()
def bake(
    pipeline: Any,
    lora: WholeLora,
    strength: float = 1.0,
    *,
    dtype: torch.dtype = torch.float32,
    path: str | Path = "the LoRA",
) -> Baked:
    """Add a LoRA's weight change to a diffusers pipeline's weights and bring all its networks to `dtype`, in place.

    Sums in float64 and rounds once. A small change added to bfloat16 weights is largely lost; `Baked.lost` says how
    much.

    Args:
        pipeline: a loaded float32 pipeline without adapters.
        lora: what to bake in.
        strength: factor on the weight change.
        dtype: of all networks afterwards.
        path: what to call the LoRA in errors.

    Raises:
        LoraError: the LoRA does not fit; the pipeline is as it was.
    """
    if not math.isfinite(strength):
        raise LoraError(f"A LoRA strength of {strength} means nothing; give a finite number.")
    fitted = []
    for component, factors in lora.parts.items():
        network = getattr(pipeline, lora.component if component == DENOISER else component, None)
        if not isinstance(network, nn.Module):
            raise LoraError(f"{path} changes the {component}, which this model lacks: it was made for another kind.")
        fitted.append((adaptable(network), fit(factors, network, path)))
    whole, lost, count = 0.0, 0.0, 0
    for layers, changes in fitted:
        for name, layer in changes.items():
            weight: Any = layers[name].weight
            change = strength * layer.change().to(weight.device)
            sum_ = (weight.double() + change).to(dtype)
            arrived = sum_.double() - weight.to(dtype).double()
            whole += float(change.square().sum())
            lost += float((arrived - change).square().sum())
            weight.copy_(sum_)
            count += 1
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            nn.Module.to(component, dtype=dtype)
    return Baked(count, math.sqrt(lost / whole) if whole else 0.0)


def save_pipeline(pipeline: Any, folder: str | Path) -> None:
    """Write a pipeline as a diffusers folder of safetensors files, whole under its name or not there at all.

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
