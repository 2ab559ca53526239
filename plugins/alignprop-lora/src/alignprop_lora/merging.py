"""Scale and merge LoRAs by their weight changes.

Merging LoRAs with weight changes D_i and weights w_i gives the weight change sum_i w_i * D_i. Averaging the factors A
and B instead would add cross terms such as B_1 A_2, which belong to neither LoRA.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignprop_core.errors import LoraError
from alignprop_core.lora.files import LoraFile
from alignprop_core.lora.formats import Factors

_OURS, _TITLE = "alignprop.", "modelspec.title"
_STRENGTH, _BASE = f"{_OURS}strength", f"{_OURS}base_model"


@dataclass(frozen=True)
class Merged:
    """Result of `merge`.

    Attributes:
        lora: the merged LoRA.
        error: ||merged - exact|| / ||exact|| over all weight changes (Frobenius norms); 0 without a rank limit.
        max_error: the largest such error of a single layer.
        max_error_layer: name of that layer.
    """

    lora: LoraFile
    error: float = 0.0
    max_error: float = 0.0
    max_error_layer: str = ""


def scale(lora: LoraFile, strength: float) -> LoraFile:
    """Return the LoRA with its weight change multiplied by `strength`.

    The header's `alignprop.strength` is the product of all factors applied since training or merging.
    """
    if not math.isfinite(strength):
        raise LoraError(f"The LoRA strength must be a finite number, not {strength}.")
    parts = {
        component: {name: layer._replace(scale=layer.scale * strength) for name, layer in part.items()}
        for component, part in lora.parts.items()
    }
    header = {**lora.header, _STRENGTH: _product(lora.header.get(_STRENGTH), strength)}
    return replace(lora, parts=parts, header=header)


def _product(before: str | None, strength: float) -> str:
    try:
        return f"{float(before or 1) * strength:g}"
    except ValueError:  # not a number: written by another program
        return f"{before} * {strength:g}"


def merge(
    loras: Sequence[LoraFile], weights: Sequence[float], *, rank: int | None = None, names: Sequence[str] = ()
) -> Merged:
    """Merge LoRAs: the result's weight change is the weighted sum of their weight changes.

    Without `rank`, A and B are concatenated: the result is exact and the ranks add up. With `rank`, each layer's change
    is truncated to its largest singular values, the best approximation of that rank (Eckart and Young 1936).

    Args:
        loras: LoRAs for the same kind of model; their layers and ranks may differ.
        weights: one weight per LoRA; may be negative; LoRAs with weight 0 are left out.
        rank: maximum rank of the result; no limit if None.
        names: names of the LoRAs for the header, which stores names and weights as `alignprop.merge` and each
            LoRA's own metadata (title, rewards, steps), in the same order, as `alignprop.inputs`.

    Raises:
        LoraError: the weights are invalid, or the LoRAs are for different models.
    """
    if len(weights) != len(loras):
        raise LoraError(f"There are {len(loras)} LoRAs and {len(weights)} weights; give one for each.")
    if not all(math.isfinite(weight) for weight in weights) or not any(weights):
        raise LoraError(
            f"The weights {', '.join(f'{w:g}' for w in weights)} are invalid: they must be finite and not all 0."
        )
    if rank is not None and rank < 1:
        raise LoraError(f"The rank must be at least 1, not {rank}; without one the result is exact.")
    if len({lora.component for lora in loras}) > 1:
        raise LoraError("These LoRAs are for different kinds of model: one changes a UNet, another a transformer.")
    used = [(lora, weight) for lora, weight in zip(loras, weights, strict=True) if weight]
    parts: dict[str, dict[str, Factors]] = {}
    for component in dict.fromkeys(name for lora, _ in used for name in lora.parts):
        layers: dict[str, list[Factors]] = {}
        for lora, weight in used:
            for name, layer in lora.parts.get(component, {}).items():
                layers.setdefault(name, []).append(layer._replace(scale=layer.scale * weight))
        parts[component] = {name: _join(name, together) for name, together in layers.items()}
    named = [{"lora": name, "weight": weight} for name, weight in zip(names, weights, strict=False)]
    header = {key: value for key, value in used[0][0].header.items() if not key.startswith(_OURS)}
    bases = {lora.header.get(_BASE) for lora, _ in used}
    if len(bases) == 1 and (base := bases.pop()) is not None:
        header[_BASE] = base
    inputs = [_metadata(lora) for lora in loras]
    header |= {"alignprop.merge": json.dumps(named)} if named else {}
    header |= {"alignprop.inputs": json.dumps(inputs)} if any(inputs) else {}
    merged = LoraFile(parts, used[0][0].component, header)
    return Merged(merged) if rank is None else _truncate(merged, rank)


def _metadata(lora: LoraFile) -> dict[str, object]:
    """Return a LoRA's title and alignprop metadata without the prefix; JSON values (rewards, inputs) are decoded."""
    title = {key: lora.header[_TITLE] for key in ("title",) if _TITLE in lora.header}
    ours = {key.removeprefix(_OURS): value for key, value in lora.header.items() if key.startswith(_OURS)}
    return title | {key: _data(value) for key, value in ours.items()}


def _data(value: str) -> object:
    try:
        return json.loads(value) if value.startswith(("[", "{")) else value
    except ValueError:
        return value


def _join(name: str, together: Sequence[Factors]) -> Factors:
    """Return factors of the sum of weight changes: concatenate the rows of A and the columns of B."""
    # A convolution of 1x1 may be stored as a linear layer, in one file and not in the other.
    most = max(layer.down.ndim for layer in together)
    together = [_with_kernel(layer, most) for layer in together]
    shapes = {(layer.up.shape[0], *layer.down.shape[1:]) for layer in together}
    if len(shapes) > 1:
        listed = " and ".join(str(tuple(shape)) for shape in sorted(shapes))
        raise LoraError(f"These LoRAs are for different models: {name} has weights of shapes {listed}.")
    downs = [layer.down.double() for layer in together]
    return Factors(torch.cat(downs, 0), torch.cat([layer.folded_up() for layer in together], 1))


def _with_kernel(layer: Factors, dimensions: int) -> Factors:
    ones = (1,) * (dimensions - layer.down.ndim)
    return layer._replace(
        down=layer.down.reshape(*layer.down.shape, *ones), up=layer.up.reshape(*layer.up.shape, *ones)
    )


def _truncate(lora: LoraFile, rank: int) -> Merged:
    total, lost, max_error, max_error_layer = 0.0, 0.0, 0.0, ""
    parts: dict[str, Mapping[str, Factors]] = {}
    for component, part in lora.parts.items():
        kept: dict[str, Factors] = {}
        for name, layer in part.items():
            kept[name], sizes = truncated(layer, rank)
            # Squared Frobenius norms: of the exact change, and of what the truncation leaves out.
            exact, left_out = float(sizes.square().sum()), float(sizes[rank:].square().sum())
            total, lost = total + exact, lost + left_out
            error = math.sqrt(left_out / exact) if exact else 0.0
            if error > max_error:
                max_error, max_error_layer = error, name
        parts[component] = kept
    return Merged(replace(lora, parts=parts), math.sqrt(lost / total) if total else 0.0, max_error, max_error_layer)


def truncated(layer: Factors, rank: int) -> tuple[Factors, Tensor]:
    """Return the best approximation of at most `rank`, and all singular values of the change, largest first.

    The SVD is of the small matrix between two QR decompositions; the full weight change is never formed.
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
