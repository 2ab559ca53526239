"""Scale and mix LoRAs: exactly, in their weight changes.

The mix of LoRAs with changes D_i and weights w_i changes weights by the sum of w_i * D_i. Averaging the factors A and B
instead gives something else: with B_1 A_1 and B_2 A_2 it adds the cross terms B_1 A_2 and B_2 A_1, which mean nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignprop_core.errors import LoraError
from alignprop_core.lora.formats import Factors
from alignprop_core.lora.whole import WholeLora

_OURS, _TITLE = "alignprop.", "modelspec.title"
_STRENGTH, _BASE = f"{_OURS}strength", f"{_OURS}base_model"


@dataclass(frozen=True)
class Mixed:
    """A mix of LoRAs.

    Attributes:
        lora: the mix.
        error: ||mix - exact|| / ||exact|| over all weight changes (Frobenius norms); 0 without a rank limit.
        worst: the same of the layer where it is largest.
        worst_layer: that layer's name.
    """

    lora: WholeLora
    error: float = 0.0
    worst: float = 0.0
    worst_layer: str = ""


def scale(lora: WholeLora, strength: float) -> WholeLora:
    """Return the LoRA with its weight change multiplied by `strength`.

    The header's `alignprop.strength` is the product over all scalings since training (or mixing).
    """
    if not math.isfinite(strength):
        raise LoraError(f"A LoRA strength of {strength} means nothing; give a finite number.")
    parts = {
        component: {name: layer._replace(scale=layer.scale * strength) for name, layer in part.items()}
        for component, part in lora.parts.items()
    }
    header = {**lora.header, _STRENGTH: _product(lora.header.get(_STRENGTH), strength)}
    return replace(lora, parts=parts, header=header)


def _product(before: str | None, strength: float) -> str:
    try:
        return f"{float(before or 1) * strength:g}"
    except ValueError:  # another program's word for it; what came after is known
        return f"{before} * {strength:g}"


def mix(
    loras: Sequence[WholeLora], weights: Sequence[float], *, rank: int | None = None, names: Sequence[str] = ()
) -> Mixed:
    """Return the LoRA whose weight change is the sum of weight * weight change.

    Without a rank, A and B are joined end to end: exact, and the ranks add up. With one, each layer's change is cut to
    its largest singular values: the nearest change of that rank (Eckart and Young 1936), and the error is said.

    Args:
        loras: LoRAs for one kind of model; they may change other layers and have other ranks.
        weights: one for each; negative ones take away, those of 0 are left out.
        rank: the highest rank of the result; None keeps all.
        names: what the LoRAs are called in the header. It says the weights under `alignprop.mix`, and under
            `alignprop.inputs`, in the same order, what the header of each LoRA says of it: title, rewards, steps.

    Raises:
        LoraError: weights that do not fit, or LoRAs for other models.
    """
    if len(weights) != len(loras):
        raise LoraError(f"There are {len(loras)} LoRAs and {len(weights)} weights; give one for each.")
    if not all(math.isfinite(weight) for weight in weights) or not any(weights):
        raise LoraError(f"The weights {', '.join(f'{w:g}' for w in weights)} give no mix; give finite ones, not all 0.")
    if rank is not None and rank < 1:
        raise LoraError(f"A rank of {rank} holds nothing; give at least 1, or leave it out for an exact mix.")
    if len({lora.component for lora in loras}) > 1:
        raise LoraError("These LoRAs are for other kinds of model: one changes a UNet, one a transformer.")
    used = [(lora, weight) for lora, weight in zip(loras, weights, strict=True) if weight]
    parts: dict[str, dict[str, Factors]] = {}
    for component in dict.fromkeys(name for lora, _ in used for name in lora.parts):
        layers: dict[str, list[Factors]] = {}
        for lora, weight in used:
            for name, layer in lora.parts.get(component, {}).items():
                layers.setdefault(name, []).append(layer._replace(scale=layer.scale * weight))
        parts[component] = {name: _join(name, together) for name, together in layers.items()}
    told = [{"lora": name, "weight": weight} for name, weight in zip(names, weights, strict=False)]
    header = {key: value for key, value in used[0][0].header.items() if not key.startswith(_OURS)}
    bases = {lora.header.get(_BASE) for lora, _ in used}
    if len(bases) == 1 and (base := bases.pop()) is not None:
        header[_BASE] = base
    inputs = [_known(lora) for lora in loras]
    header |= {"alignprop.mix": json.dumps(told)} if told else {}
    header |= {"alignprop.inputs": json.dumps(inputs)} if any(inputs) else {}
    mixed = WholeLora(parts, used[0][0].component, header)
    return Mixed(mixed) if rank is None else _cut(mixed, rank)


def _known(lora: WholeLora) -> dict[str, object]:
    """Return what a LoRA's header says of it, without the prefix; values that are JSON (rewards, mixes) as data."""
    title = {key: lora.header[_TITLE] for key in ("title",) if _TITLE in lora.header}
    ours = {key.removeprefix(_OURS): value for key, value in lora.header.items() if key.startswith(_OURS)}
    return title | {key: _data(value) for key, value in ours.items()}


def _data(value: str) -> object:
    try:
        return json.loads(value) if value.startswith(("[", "{")) else value
    except ValueError:
        return value


def _join(name: str, together: Sequence[Factors]) -> Factors:
    """Return factors of the sum of weight changes: rows of A and columns of B end to end."""
    shapes = {(layer.up.shape[0], *layer.down.shape[1:]) for layer in together}
    if len(shapes) > 1:
        told = " and ".join(str(tuple(shape)) for shape in sorted(shapes))
        raise LoraError(f"These LoRAs are for other models: {name} has weights of shapes {told}.")
    downs = [layer.down.double() for layer in together]
    return Factors(torch.cat(downs, 0), torch.cat([layer.folded_up() for layer in together], 1))


def _cut(lora: WholeLora, rank: int) -> Mixed:
    whole, lost, worst, worst_layer = 0.0, 0.0, 0.0, ""
    parts: dict[str, Mapping[str, Factors]] = {}
    for component, part in lora.parts.items():
        cut: dict[str, Factors] = {}
        for name, layer in part.items():
            cut[name], sizes = truncated(layer, rank)
            all_of_it, left_out = float(sizes.square().sum()), float(sizes[rank:].square().sum())
            whole, lost = whole + all_of_it, lost + left_out
            here = math.sqrt(left_out / all_of_it) if all_of_it else 0.0
            if here > worst:
                worst, worst_layer = here, name
        parts[component] = cut
    return Mixed(replace(lora, parts=parts), math.sqrt(lost / whole) if whole else 0.0, worst, worst_layer)


def truncated(layer: Factors, rank: int) -> tuple[Factors, Tensor]:
    """Return the nearest weight change of at most `rank`, and all singular values of the change, largest first.

    Works on the small square between two QR decompositions; the full change is never formed.
    """
    up, down = layer.folded_up().flatten(1), layer.down.double().flatten(1)
    left, inner_up = torch.linalg.qr(up)
    right, inner_down = torch.linalg.qr(down.T)
    u, sizes, v = torch.linalg.svd(inner_up @ inner_down.T)
    count = max(1, min(rank, int((sizes > sizes[0] * 1e-12).sum()))) if len(sizes) else 1
    root = sizes[:count].sqrt()
    new_up = (left @ u[:, :count]) * root
    new_down = root[:, None] * (v[:count] @ right.T)
    shaped_up = new_up.reshape(new_up.shape[0], count, *layer.up.shape[2:])
    return Factors(new_down.reshape(count, *layer.down.shape[1:]), shaped_up), sizes
