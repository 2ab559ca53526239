"""Head of the aesthetic predictor: five linear layers on a unit CLIP embedding, and its published file formats."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alignprop_core.errors import WeightsError

WIDTHS = (768, 1024, 128, 64, 16, 1)
"""Layer sizes of the published heads, input first."""

# Indices of the linear layers in the author's nn.Sequential, with dropout between them, and ReLU in the second variant.
_LINEAR, _RELU = (0, 2, 4, 6, 7), (0, 3, 6, 9, 11)
_KEY = re.compile(r"^(?P<prefix>(?:\w+\.)*)(?P<number>\d+)\.(?P<kind>weight|bias)$")


class Head(nn.Module):
    """Five linear layers: W5(W4(W3(W2(W1 e + b1) + b2) + b3) + b4) + b5, optionally with ReLU after all but the last.

    Dropout between the layers is the identity in evaluation. Without ReLU the head is one affine function of e; it is
    still computed layer by layer, like the original, because the cost is negligible beside CLIP.

    Reference: https://github.com/christophschuhmann/improved-aesthetic-predictor

    Args:
        layers: (weight (out, in), bias (out,)) of each layer, input first.
        activation: "none" or "relu".
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]], activation: Literal["none", "relu"] = "none") -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(weight, requires_grad=False) for weight, _ in layers])
        self.biases = nn.ParameterList([nn.Parameter(bias, requires_grad=False) for _, bias in layers])
        self.activation = activation

    @property
    def width(self) -> int:
        """Size of the input embedding."""
        return int(self.weights[0].shape[1])

    def forward(self, embedding: Tensor) -> Tensor:
        """Return (B,) ratings of (B, width) unit embeddings, in the dtype of the embeddings."""
        x = embedding
        with torch.autocast(x.device.type, enabled=False):
            for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True), start=1):
                x = F.linear(x, weight.to(x), bias.to(x))
                if self.activation == "relu" and number < len(self.weights):
                    x = x.relu()
        return x.squeeze(-1)  # (B, 1) -> (B,)


def read_head(
    checkpoint: Mapping[str, Any], where: str, activation: Literal["none", "relu"], *, published: bool = True
) -> Head:
    """Build the head from a checkpoint.

    Keys are `layers.N.weight` and `layers.N.bias`, with any prefix ("mlp.", "module.", "model.") or none. N is the
    index in the author's nn.Sequential, which shows whether there is a ReLU between the layers.

    Args:
        checkpoint: the contents of the file, flat or nested under "state_dict".
        where: the file, for messages.
        activation: the activation set in the options.
        published: whether the layers must have the sizes of the published heads.

    Raises:
        WeightsError: the checkpoint is not an aesthetic head, or its sizes or activation are different.
    """
    state = checkpoint.get("state_dict", checkpoint)
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, Mapping) else {}
    matches = {key: _KEY.match(key) for key in tensors}
    if not tensors or None in matches.values() or len({m["prefix"] for m in matches.values() if m}) != 1:
        shown = ", ".join(list(tensors)[:3]) or "no tensors"
        raise WeightsError(
            f"{where} is not an aesthetic head: it contains {shown}. A head has layers.N.weight and layers.N.bias of "
            "five linear layers. To set the CLIP model, use the option clip_weights."
        )
    layers = {(int(m["number"]), m["kind"]): tensors[key].float() for key, m in matches.items() if m}
    numbers = tuple(sorted({number for number, _ in layers}))
    missing = [f"{n}.{kind}" for n in numbers for kind in ("weight", "bias") if (n, kind) not in layers]
    if numbers not in (_LINEAR, _RELU) or missing:
        raise WeightsError(
            f"{where} is not a known aesthetic head: its layers are {', '.join(map(str, numbers))}"
            f"{', without ' + ', '.join(missing) if missing else ''}; expected {_LINEAR}, or {_RELU} with ReLU. Choose "
            "another file for the option weights."
        )
    if activation != (needed := "relu" if numbers == _RELU else "none"):
        kind = "with" if needed == "relu" else "without"
        raise WeightsError(f"{where} is a head {kind} ReLU (layers {numbers}): set the option activation: {needed}.")
    pairs = [(layers[n, "weight"], layers[n, "bias"]) for n in numbers]
    _check_sizes(pairs, where, published)
    return Head(pairs, activation)


def _check_sizes(pairs: list[tuple[Tensor, Tensor]], where: str, published: bool) -> None:
    """Check that the sizes of consecutive layers match and that the last layer has one output."""
    weights = [weight for weight, _ in pairs]
    sizes = " -> ".join(str(tuple(weight.shape)) for weight in weights)
    fits = all(w.ndim == 2 and b.shape == w.shape[:1] for w, b in pairs) and weights[-1].shape[0] == 1
    fits = fits and all(after.shape[1] == before.shape[0] for before, after in pairwise(weights))
    if not fits:
        raise WeightsError(
            f"{where}: the layers of this head do not fit each other: {sizes}. Choose another file for the "
            "option weights."
        )
    widths = (weights[0].shape[1], *(weight.shape[0] for weight in weights))
    if published and widths != WIDTHS:
        raise WeightsError(
            f"{where}: this head has sizes {'-'.join(map(str, widths))}; LAION's head for ViT-L/14 has "
            f"{'-'.join(map(str, WIDTHS))}. Choose a head for ViT-L/14, or one whose header stores its CLIP model."
        )
