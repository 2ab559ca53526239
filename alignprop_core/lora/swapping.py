"""Adapters that come and go on a live model: remove one, or apply LoRA files for a while in place of others."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from alignprop_core.lora.adapters import ADAPTER, attach_frozen
from alignprop_core.lora.layers import activate, bare, layers_of


def parts_of(pipeline: Any) -> list[nn.Module]:
    """Return the networks of a diffusers pipeline."""
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]


def active_adapters(pipeline: Any) -> list[tuple[Any, list[str]]]:
    """Return the adapted layers of a diffusers pipeline, each with the names of its active adapters."""
    layers = [module for part in parts_of(pipeline) for module in part.modules() if isinstance(module, LoraLayer)]
    return [(layer, list(layer.active_adapters)) for layer in layers]


def also_activate(layers: Iterable[tuple[Any, list[str]]], names: Collection[str]) -> None:
    """Activate adapters of layers beside those that are given with each layer."""
    for layer, active in layers:
        activate(layer, [*active, *(name for name in names if name in layer.lora_A)])


def detach(model: nn.Module, name: str = ADAPTER) -> None:
    """Remove an adapter from a network; other adapters stay as they are. Without any, its layers are plain again."""
    model = bare(model)
    for path, layer in layers_of(model, name):
        activate(layer, [other for other in layer.active_adapters if other != name])
        layer.delete_adapter(name)
        if not layer.lora_A:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    known: Any = model
    configs = getattr(known, "peft_config", {})
    configs.pop(name, None)
    if not configs and hasattr(known, "_hf_peft_config_loaded"):
        known._hf_peft_config_loaded = False
        known.__dict__.pop("peft_config", None)


@contextmanager
def applied(pipeline: Any, loras: Sequence[tuple[str | Path, float]], instead_of: Collection[str]) -> Iterator[None]:
    """Apply LoRA files at their strengths inside the block, with the adapters `instead_of` switched off."""
    before = active_adapters(pipeline)
    names = [f"applied_{number}" for number in range(len(loras))]
    try:
        for name, (path, strength) in zip(names, loras, strict=True):
            attach_frozen(pipeline, path, strength, name)
        also_activate([(layer, [name for name in active if name not in instead_of]) for layer, active in before], names)
        yield
    finally:
        for part in parts_of(pipeline):
            for name in names:
                detach(part, name)
        for layer, active in before:
            activate(layer, active)
