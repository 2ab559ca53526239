"""Adapters on a loaded model, through peft: attach, scale, disable, save."""

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
from alignprop_core.lora.files import FORMATS, LoraFile, architecture, write_files
from alignprop_core.lora.formats import Factors, read_lora
from alignprop_core.lora.layers import (
    activate,
    adaptable,
    adapter_names,
    attached,
    bare,
    ending,
    find_targets,
    fit,
    initial_a,
    inject,
    layers_of,
    scale_of,
)
from alignprop_core.lora.names import DENOISER

ADAPTER = "alignprop"
"""Name of the adapter that is trained."""

DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Layers that are adapted by default: the attention projections of the denoiser."""
FUSED_TARGETS = ("to_qkv_mlp_proj", "to_out")
"""The same in blocks that compute them together with the feed-forward layer (FLUX.2); adapted where a model has them.
"""


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
        rank: rank of the weight changes.
        alpha: the change is scaled by alpha / rank; None means alpha = rank.
        target_modules: names of layers, or ends of names at a dot (`to_q`, `mid_block.attentions.0.proj_in`);
            None means `DEFAULT_TARGETS` and `FUSED_TARGETS`.
        use_rslora: scale by alpha / sqrt(rank) instead (rsLoRA).
        init_from: a LoRA folder or file, in either format, whose weight change is the initial one. Target layers that
            are not in the file start with B = 0.
        seed: without `init_from`, A depends on the seed and the layer's name alone, uniform in +-1/sqrt(inputs), and
            B = 0. The global random state is neither used nor changed.
        dtype: dtype of the adapter, independent of the base network's.

    Raises:
        LoraError: the network already has a trainable adapter, a target is unknown, or the file does not fit.
    """
    if rank < 1:
        raise LoraError(f"lora.rank is {rank}: it must be at least 1.")
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise LoraError(f"lora.alpha is {alpha}: it must be above 0; omit it for alpha = rank.")
    if ADAPTER in adapter_names(denoiser):
        raise LoraError("This model already has a trainable adapter. Load the model again, or train that adapter.")
    if target_modules is None:
        fused = [target for target in FUSED_TARGETS if any(name.endswith(f".{target}") for name in adaptable(denoiser))]
        target_modules = [*DEFAULT_TARGETS, *fused]
    names = find_targets(denoiser, target_modules)
    start = _start_from(init_from, denoiser, rank, names) if init_from is not None else {}

    denoiser.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha or rank, use_rslora=use_rslora, target_modules=names)
    inject(denoiser, config, ADAPTER, dtype, trainable=True)
    with torch.no_grad():
        for name, layer in layers_of(denoiser, ADAPTER):
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            a.copy_(initial_a(a.shape, seed, name))
            b.zero_()
            if name in start:
                # Files are padded to one rank. A keeps its initial value where it is zero, or B would get no gradient.
                used = start[name].down.flatten(1).any(1)
                a[used] = start[name].down[used].to(a)
                # The file's scale goes into B, divided by this adapter's own, so that the product is the file's change.
                b[:, used] = (start[name].folded_up() / scale_of(layer, ADAPTER))[:, used].to(b)
    return parameters(denoiser)


def attach_frozen(
    model: Any, path: str | Path, strength: float = 1.0, name: str = "frozen", dtype: torch.dtype = torch.float32
) -> None:
    """Apply a LoRA of either format, frozen, in addition to all other adapters.

    Args:
        model: a diffusers pipeline, whose denoiser and text encoders get their parts of the file; or a denoiser alone,
            with which a file that also changes a text encoder is an error.
        path: a LoRA folder or file.
        strength: factor on the weight change.
        name: name of the adapter; unique on the model.
        dtype: dtype of the adapter, independent of the base network's.

    Raises:
        LoraError: the file cannot be read or does not fit; the model is unchanged.
    """
    if not math.isfinite(strength):
        raise LoraError(f"{path}: the strength is {strength}; it must be a finite number.")
    if isinstance(model, nn.Module):
        components: dict[str, nn.Module | None] = {DENOISER: model}
    else:
        components = {DENOISER: getattr(model, "unet", None) or getattr(model, "transformer", None)}
        components |= {part: getattr(model, part, None) for part in ("text_encoder", "text_encoder_2")}

    # All parts are checked before the first is changed.
    fitted: list[tuple[nn.Module, dict[str, Factors]]] = []
    for component, factors in read_lora(path).items():
        part = components.get(component)
        if part is None:
            raise LoraError(
                f"{path} also changes the {component}, which this model does not have or which was not passed. "
                "Use a LoRA made for this kind of model; in code, pass the whole pipeline."
            )
        if name in adapter_names(part):
            raise LoraError(f"{path}: the model already has an adapter named {name}; choose another name.")
        fitted.append((part, fit(factors, part, path)))

    for part, factors in fitted:
        # alpha = rank for each layer: the scale is folded into B.
        ranks = {f"^{re.escape(module)}": layer.rank for module, layer in factors.items()}
        targets = "|".join(map(re.escape, factors))  # a pattern of full names; peft would compare a list's with ends
        config = LoraConfig(target_modules=targets, rank_pattern=ranks, alpha_pattern=ranks)
        inject(part, config, name, dtype, trainable=False)
        with torch.no_grad():
            for module, layer in layers_of(part, name):
                layer.lora_A[name].weight.copy_(factors[module].down)
                layer.lora_B[name].weight.copy_(factors[module].folded_up())
        set_strength(part, strength, name=name)


def parameters(denoiser: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters: A (rank, in, ...) and B (out, rank, ...) of each layer, in module order."""
    return list(_named_parameters(denoiser).values())


def _named_parameters(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{factor}": getattr(layer, factor)[ADAPTER].weight
        for name, layer in attached(denoiser, ADAPTER)
        for factor in ("lora_A", "lora_B")
    }


def set_strength(denoiser: nn.Module, strength: float, *, name: str = ADAPTER) -> None:
    """Multiply an adapter's weight change: 0 is the base, 1 as trained. `save` and `state` ignore it."""
    if not math.isfinite(strength):
        raise LoraError(f"The LoRA strength is {strength}; it must be a finite number.")
    for _, layer in attached(denoiser, name):
        layer.set_scale(name, strength)


@contextmanager
def disabled(denoiser: nn.Module, *, name: str = ADAPTER) -> Iterator[None]:
    """Disable an adapter inside the block, by default the trainable one; others stay on. Nests."""
    before = [(layer, list(layer.active_adapters)) for _, layer in attached(denoiser, name)]
    try:
        for layer, active in before:
            activate(layer, [adapter for adapter in active if adapter != name])
        yield
    finally:
        for layer, active in before:
            activate(layer, active)


def state(denoiser: nn.Module) -> dict[str, Tensor]:
    """Return copies of the trainable adapter's tensors, on the same device in the same dtype, for checkpoints."""
    return {key: parameter.detach().clone() for key, parameter in _named_parameters(denoiser).items()}


def load_state(denoiser: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `state` returned.

    Raises:
        LoraError: names or shapes differ from the attached adapter's; nothing is changed.
    """
    own = _named_parameters(denoiser)
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
    """Return the trained weight change at strength 1, {module name: Factors}, on the CPU.

    Files are computed in float64, which Apple GPUs lack.
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
    formats: tuple[str, ...] = FORMATS,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the trained adapter into a folder: diffusers' format, and NAME.safetensors in kohya's layout.

    Args:
        denoiser: the network with the trainable adapter.
        folder: the folder; created if it does not exist. Each file is written atomically.
        name: name of the file in kohya's layout, without suffix.
        metadata: entries of the files' headers.
        component: the denoiser's name in its pipeline, "unet" or "transformer".
        formats: what to write: "diffusers", "kohya" or both.
        dtype: dtype of the stored tensors.

    Raises:
        LoraError: the name is that of diffusers' file, or contains a folder.
        OutputError: the folder cannot be written to.
    """
    network = bare(denoiser)
    width = getattr(getattr(network, "config", None), "cross_attention_dim", None)
    header = architecture(width, type(network).__name__) | dict(metadata or {})
    lora = LoraFile({DENOISER: current(denoiser)}, component, header)
    write_files(lora, folder, name, formats=formats, title=header.get("modelspec.title"), dtype=dtype)


def _start_from(path: str | Path, denoiser: nn.Module, rank: int, names: Sequence[str]) -> dict[str, Factors]:
    """Return the factors of `lora.init_from` by layer name, checked against the new adapter's rank and layers."""
    parts = read_lora(path)
    if others := sorted(parts.keys() - {DENOISER}):
        raise LoraError(
            f"lora.init_from: {path} also changes the {others[0]}, and only the denoiser is trained here. "
            "List it under model.loras instead, which applies it frozen."
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
