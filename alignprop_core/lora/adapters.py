"""Adapters on a live model, through peft: attach, freeze, scale, switch off, save."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from alignprop_core.errors import LoraError
from alignprop_core.locate import DIFFUSERS_NAME
from alignprop_core.lora.formats import (
    DENOISER,
    Factors,
    read_lora,
    write_diffusers,
    write_kohya,
)
from alignprop_core.lora.layers import (
    activate,
    adapter_names,
    attached,
    bare,
    drawn,
    ending,
    find_targets,
    fit,
    inject,
    layers_of,
    scale_of,
)
from alignprop_core.lora.whole import architecture

ADAPTER = "alignprop"
"""Name of the adapter that is trained."""

DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""The attention projections of the denoiser."""


def attach(
    denoiser: nn.Module,
    *,
    rank: int,
    alpha: float | None = None,
    target_modules: Sequence[str] | None = None,
    use_rslora: bool = False,
    init_from: str | Path | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[nn.Parameter]:
    """Freeze `denoiser`, add the trainable adapter, and return its parameters (A, B, A, B, ... in module order).

    Args:
        denoiser: the network to adapt; linear and convolution layers can be.
        rank: inner size of the factors.
        alpha: the change is scaled by alpha / rank; None means alpha = rank.
        target_modules: names of layers, or ends of names at a dot (`to_q`, `mid_block.attentions.0.proj_in`);
            None means `DEFAULT_TARGETS`.
        use_rslora: scale by alpha / sqrt(rank) instead.
        init_from: a LoRA folder or file to go on from, in either format: the weight change starts as the file's.
            Target layers the file does not name start at no change.
        seed: A is drawn from this and the layer's name alone, uniform in +-1/sqrt(inputs); B is zero. The global
            random state is neither read nor moved.
        dtype: of the adapter, whatever the base has.

    Raises:
        LoraError: an adapter is attached already, a target is unknown, or the file does not fit.
    """
    if rank < 1:
        raise LoraError(f"lora.rank is {rank}: it must be at least 1.")
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise LoraError(f"lora.alpha is {alpha}: it must be above 0; leave it out for alpha = rank.")
    if ADAPTER in adapter_names(denoiser):
        raise LoraError("This model carries a trainable adapter already. Build a fresh model, or train the one it has.")
    names = find_targets(denoiser, DEFAULT_TARGETS if target_modules is None else target_modules)
    start = _start_from(init_from, denoiser, rank, names) if init_from is not None else {}

    denoiser.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        use_rslora=use_rslora,
        target_modules=names,
    )
    inject(denoiser, config, ADAPTER, dtype, trainable=True)
    with torch.no_grad():
        for name, layer in layers_of(denoiser, ADAPTER):
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            if name in start:
                a.copy_(start[name].down)
                b.copy_(start[name].folded_up() / scale_of(layer, ADAPTER))
            else:
                a.copy_(drawn(a.shape, seed, name))
                b.zero_()
    return parameters(denoiser)


def attach_frozen(
    model: Any, path: str | Path, strength: float = 1.0, name: str = "frozen", dtype: torch.dtype = torch.float32
) -> None:
    """Apply a LoRA of either format at `strength`, and freeze it; it stays active beside every other adapter.

    Args:
        model: a diffusers pipeline, whose denoiser and text encoders take their parts of the file; or a denoiser
            alone, and then a file that also changes a text encoder is refused.
        path: a LoRA folder or file.
        strength: factor on the weight change; 1 is the file's own.
        name: name of the adapter; every LoRA on a model has its own.
        dtype: of the adapter, whatever the base has.

    Raises:
        LoraError: the file cannot be read or does not fit; the model is as it was.
    """
    if not math.isfinite(strength):
        raise LoraError(f"{path}: its strength is {strength}; give a finite number.")
    if isinstance(model, nn.Module):
        components: dict[str, nn.Module | None] = {DENOISER: model}
    else:
        components = {DENOISER: getattr(model, "unet", None) or getattr(model, "transformer", None)}
        components |= {part: getattr(model, part, None) for part in ("text_encoder", "text_encoder_2")}

    fitted: list[tuple[nn.Module, dict[str, Factors]]] = []
    for component, factors in read_lora(path).items():
        part = components.get(component)
        if part is None:
            raise LoraError(
                f"{path} also changes the {component}, which this model lacks or which was not given. "
                "Use a LoRA made for this kind of model; in code, pass the whole pipeline."
            )
        if name in adapter_names(part):
            raise LoraError(f"{path}: an adapter named {name} is on the model already; choose another name.")
        fitted.append((part, fit(factors, part, path)))

    for part, factors in fitted:
        ranks = {f"^{re.escape(module)}": layer.rank for module, layer in factors.items()}
        config = LoraConfig(target_modules=list(factors), rank_pattern=ranks, alpha_pattern=ranks)
        inject(part, config, name, dtype, trainable=False)
        with torch.no_grad():
            for module, layer in layers_of(part, name):
                layer.lora_A[name].weight.copy_(factors[module].down)
                layer.lora_B[name].weight.copy_(factors[module].folded_up())
        set_strength(part, strength, name=name)


def parameters(denoiser: nn.Module) -> list[nn.Parameter]:
    """The trainable adapter's parameters, A and B of each layer in module order."""
    found: list[nn.Parameter] = []
    for _, layer in attached(denoiser, ADAPTER):
        found += [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
    return found


def set_strength(denoiser: nn.Module, strength: float, *, name: str = ADAPTER) -> None:
    """Scale an adapter's weight change: 0 is the base, 1 as trained. `save` and `state` do not see it."""
    if not math.isfinite(strength):
        raise LoraError(f"A LoRA strength of {strength} means nothing; give a finite number.")
    for _, layer in attached(denoiser, name):
        layer.set_scale(name, strength)


@contextmanager
def disabled(denoiser: nn.Module, *, name: str = ADAPTER) -> Iterator[None]:
    """The model without the trained adapter; frozen LoRAs stay on. Nests, and costs nothing in the forward pass."""
    before = [(layer, list(layer.active_adapters)) for _, layer in attached(denoiser, name)]
    try:
        for layer, active in before:
            activate(layer, [adapter for adapter in active if adapter != name])
        yield
    finally:
        for layer, active in before:
            activate(layer, active)


def state(denoiser: nn.Module) -> dict[str, Tensor]:
    """The trainable adapter's raw tensors (copies, same device and dtype), for checkpoints: exact."""
    tensors: dict[str, Tensor] = {}
    for name, layer in attached(denoiser, ADAPTER):
        tensors[f"{name}.lora_A"] = layer.lora_A[ADAPTER].weight.detach().clone()
        tensors[f"{name}.lora_B"] = layer.lora_B[ADAPTER].weight.detach().clone()
    return tensors


def load_state(denoiser: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `state` gave.

    Raises:
        LoraError: names or shapes differ from the attached adapter's; nothing is changed then.
    """
    own: dict[str, Tensor] = {}
    for name, layer in attached(denoiser, ADAPTER):
        own |= {f"{name}.lora_A": layer.lora_A[ADAPTER].weight, f"{name}.lora_B": layer.lora_B[ADAPTER].weight}
    if odd := sorted(own.keys() ^ tensors.keys()):
        raise LoraError(
            f"The saved adapter has other layers than this one ({odd[0]}): lora.target_modules were different."
        )
    for key, parameter in own.items():
        if parameter.shape != tensors[key].shape:
            raise LoraError(
                f"The saved adapter does not fit: {key} is {tuple(tensors[key].shape)} in the checkpoint and "
                f"{tuple(parameter.shape)} here. Use the lora.rank and the model it was saved with."
            )
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(tensors[key])


def current(denoiser: nn.Module) -> dict[str, Factors]:
    """The trained weight change at strength 1: {module name: Factors}, in the CPU's memory.

    There because it is written in float64 first, which Apple GPUs lack.
    """
    return {
        name: Factors(
            layer.lora_A[ADAPTER].weight.detach().cpu(),
            layer.lora_B[ADAPTER].weight.detach().cpu(),
            scale_of(layer, ADAPTER),
        )
        for name, layer in attached(denoiser, ADAPTER)
    }


def save(
    denoiser: nn.Module,
    folder: Path,
    *,
    name: str,
    metadata: Mapping[str, str] | None = None,
    component: str = "unet",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the trained adapter twice into `folder`: diffusers' format, and NAME.safetensors in kohya's layout.

    Each file appears whole or not at all. `component` is the denoiser's name in its pipeline ("unet" or "transformer").

    Raises:
        LoraError: the name is that of diffusers' own file, or is no plain file name.
        OutputError: the folder cannot be written to.
    """
    file = f"{name}.safetensors"
    if file.endswith(DIFFUSERS_NAME) or Path(file).name != file:
        raise LoraError(f'"{name}" cannot name a LoRA file; choose a plain name such as "my-style".')
    folder = Path(folder)
    header = {str(key): str(value) for key, value in (metadata or {}).items()}
    write_diffusers(folder / DIFFUSERS_NAME, current(denoiser), component=component, metadata=header, dtype=dtype)
    save_kohya(denoiser, folder / file, metadata=header, component=component, dtype=dtype)


def save_kohya(
    denoiser: nn.Module,
    file: Path,
    *,
    metadata: Mapping[str, str] | None = None,
    component: str = "unet",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the trained adapter in kohya's layout with a modelspec header, atomically. Errors as `save`."""
    header = _architecture(bare(denoiser))
    header |= {str(key): str(value) for key, value in (metadata or {}).items()}
    write_kohya(Path(file), current(denoiser), component=component, metadata=header, dtype=dtype)


def _architecture(denoiser: nn.Module) -> dict[str, str]:
    width = getattr(getattr(denoiser, "config", None), "cross_attention_dim", None)
    return architecture(width if isinstance(width, int) else None, type(denoiser).__name__)


def _start_from(path: str | Path, denoiser: nn.Module, rank: int, names: Sequence[str]) -> dict[str, Factors]:
    """The factors of `lora.init_from`, checked against the adapter about to be made."""
    parts = read_lora(path)
    if others := sorted(parts.keys() - {DENOISER}):
        raise LoraError(
            f"lora.init_from: {path} also changes the {others[0]}, and only the denoiser is trained here. "
            "List it under model.loras instead: it is then applied and frozen."
        )
    start = fit(parts[DENOISER], denoiser, path)
    ranks = sorted({layer.rank for layer in start.values()})
    if ranks != [rank]:
        wanted = f"set lora.rank={ranks[0]}" if len(ranks) == 1 else "list it under model.loras, where ranks may differ"
        raise LoraError(
            f"lora.init_from: {path} has rank {', '.join(map(str, ranks))} and lora.rank is {rank}: {wanted}."
        )
    if missing := [name for name in start if name not in set(names)]:
        wanted = ", ".join(sorted({ending(name) for name in start}))
        raise LoraError(
            f"lora.init_from: {path} changes {missing[0]}, which lora.target_modules does not contain. Set "
            f"lora.target_modules=[{wanted}]."
        )
    return start
