"""The layers of adapters: find them by name, add peft's layers, match a file's factors with them."""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from alignprop_core.errors import LoraError, did_you_mean
from alignprop_core.lora.formats import Factors
from alignprop_core.lora.names import flatten_name


def bare(model: nn.Module) -> nn.Module:
    """Return the network inside torch.compile and DistributedDataParallel, which change layer names."""
    while inner := getattr(model, "_orig_mod", None) or (
        model.module if isinstance(model, nn.parallel.DistributedDataParallel) else None
    ):
        model = inner
    return model


def adapter_names(model: nn.Module) -> set[str]:
    """Return the names of all adapters on the model."""
    return {name for module in model.modules() if isinstance(module, LoraLayer) for name in module.lora_A}


def layers_of(model: nn.Module, name: str) -> list[tuple[str, Any]]:
    """Return (module name, peft layer) of each layer of an adapter, in module order."""
    return [(n, m) for n, m in bare(model).named_modules() if isinstance(m, LoraLayer) and name in m.lora_A]


def attached(model: nn.Module, name: str) -> list[tuple[str, Any]]:
    """Return `layers_of`; raises `LoraError` if the model does not have the adapter."""
    layers = layers_of(model, name)
    if not layers:
        raise LoraError(f'This model has no adapter "{name}": load it with `Sampler.load(model, rank=8)`.')
    return layers


def scale_of(layer: Any, name: str) -> float:
    """Return alpha / rank, or alpha / sqrt(rank) with rank-stabilized scaling; independent of the strength."""
    rank = layer.r[name]
    return float(layer.lora_alpha[name]) / (math.sqrt(rank) if layer.use_rslora.get(name) else rank)


def activate(layer: Any, names: Sequence[str]) -> None:
    """Activate exactly these adapters of a layer, without peft's side effect on `requires_grad`."""
    flags = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
    layer.set_adapter(list(names))
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def inject(model: nn.Module, config: LoraConfig, name: str, dtype: torch.dtype, *, trainable: bool) -> None:
    """Add peft's layers for one adapter; other adapters stay active, frozen or trainable as they are."""
    model = bare(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    # peft initializes the factors at random, and they are overwritten: keep the global random state unchanged.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(config, model, adapter_name=name)
    marked: Any = model
    if hasattr(marked, "_hf_peft_config_loaded"):
        marked._hf_peft_config_loaded = True  # so that diffusers' own adapter methods see it
    for _, layer in layers_of(model, name):
        layer.set_adapter(list(layer.lora_A))
        for factor in (layer.lora_A[name], layer.lora_B[name]):
            factor.to(dtype=dtype)
            factor.requires_grad_(trainable)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def initial_a(shape: torch.Size, seed: int, name: str) -> Tensor:
    """Return the initial A of a layer: uniform in +-1/sqrt(inputs), as peft's, from the seed and the name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return (torch.rand(shape, generator=generator, dtype=torch.float32) * 2 - 1) * bound


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that a LoRA can change, by their names without adapters."""
    found: dict[str, nn.Module] = {}
    inside: list[str] = []
    for name, module in bare(model).named_modules():
        # Modules inside an adapted layer are peft's.
        if any(name.startswith(f"{outer}.") for outer in inside[-1:]):
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(name)
            module = module.get_base_layer()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            found[name] = module
    return found


def find_targets(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the full names of the layers that match the targets, in module order; raises `LoraError`."""
    known = adaptable(model)
    if not targets:
        raise LoraError("lora.target_modules is empty: name layers, or omit it for the attention projections.")
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in known):
            ends = sorted({ending(name) for name in known})
            raise LoraError(
                f'lora.target_modules: this model has no linear or convolution layer named "{target}".'
                f"{did_you_mean(target, [*ends, *known])} It has: {', '.join(ends)}."
            )
    return [name for name in known if any(name == t or name.endswith(f".{t}") for t in targets)]


def ending(name: str) -> str:
    """Return the descriptive end of a layer's name: `to_out.0`, `net.0.proj`, `to_q`."""
    match = re.search(r"[A-Za-z]\w*(\.\d+)*(\.proj)?$", name)
    return match[0] if match else name


def fit(factors: Mapping[str, Factors], model: nn.Module, path: str | Path) -> dict[str, Factors]:
    """Return a file's factors by this model's own layer names.

    Args:
        factors: the file's factors by its module names.
        model: the network.
        path: the file, for messages.

    Raises:
        LoraError: the model does not have one of the layers, or its weight has another shape.
    """
    known = adaptable(model)
    by_flat = {flatten_name(name): name for name in known}
    fitted: dict[str, Factors] = {}
    for module, layer in factors.items():
        flat = flatten_name(module)
        # transformers 5 dropped CLIP's outer "text_model"; files keep it.
        name = by_flat.get(flat) or by_flat.get(flat.removeprefix("text_model_"))
        if name is None:
            raise LoraError(
                f"{path} changes the layer {module}, which this {type(model).__name__} does not have: "
                f"it was made for another kind of model.{did_you_mean(module, known)}"
            )
        weight = getattr(known[name], "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():  # quantized weights have packed shapes
            kernel, down = weight.shape[1:], layer.down.flatten(1)
            # Some files have convolutions flat, as linear layers.
            if all(size == 1 for size in layer.down.shape[2:]) and down.shape[1] == kernel.numel():
                up = layer.up.reshape(*layer.up.shape[:2], *(1 for _ in kernel[1:]))
                layer = layer._replace(down=down.reshape(-1, *kernel), up=up)
            change = (layer.up.shape[0], *layer.down.shape[1:])
            if tuple(weight.shape) != change:
                raise LoraError(
                    f"{path} does not fit this model: {module} changes weights of shape {change}, and they are "
                    f"{tuple(weight.shape)} here. It was made for another base model."
                )
        fitted[name] = layer
    return fitted
