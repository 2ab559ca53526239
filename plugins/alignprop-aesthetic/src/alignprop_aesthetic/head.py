"""The aesthetic predictor's head: five linear layers on a unit CLIP embedding, in the formats it is published in."""

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
"""Input and output sizes of the published heads' layers."""

# Numbers of the linear layers in the author's nn.Sequential: dropout between them, and ReLU in the other variant.
_LINEAR, _RELU = (0, 2, 4, 6, 7), (0, 3, 6, 9, 11)
_KEY = re.compile(r"^(?P<prefix>(?:\w+\.)*)(?P<number>\d+)\.(?P<kind>weight|bias)$")


class Head(nn.Module):
    """score = W5(W4(W3(W2(W1 e + b1) + b2) + b3) + b4) + b5, or with ReLU after each layer but the last.

    Dropout, which training had between the layers, is the identity at evaluation. Without ReLU the whole is one affine
    function of e; it is computed layer by layer all the same, as the original does: that costs nothing beside CLIP.

    Args:
        layers: (weight, bias) of each layer, input first.
        activation: "none" or "relu".
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]], activation: Literal["none", "relu"] = "none") -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(weight, requires_grad=False) for weight, _ in layers])
        self.biases = nn.ParameterList([nn.Parameter(bias, requires_grad=False) for _, bias in layers])
        self.activation = activation

    @property
    def width(self) -> int:
        """Length of the embedding it takes."""
        return int(self.weights[0].shape[1])

    def forward(self, embedding: Tensor) -> Tensor:
        """Return (B,) ratings of (B, width) unit embeddings, in the embeddings' type."""
        x = embedding
        with torch.autocast(x.device.type, enabled=False):
            for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True), start=1):
                x = F.linear(x, weight.to(x), bias.to(x))
                if self.activation == "relu" and number < len(self.weights):
                    x = x.relu()
        return x.squeeze(-1)


def read_head(
    found: Mapping[str, Any], where: str, activation: Literal["none", "relu"], *, published: bool = True
) -> Head:
    """Take the head out of a checkpoint.

    Keys are `layers.N.weight` and `.bias`, with anything before them ("mlp.", "module.", "model.layers.") or nothing;
    N counts the author's nn.Sequential, and so tells whether there was a ReLU between the layers.

    Args:
        found: what the file holds; a nested "state_dict" is taken.
        where: the file, for messages.
        activation: what the run config says.
        published: whether it must have the sizes of the published heads.

    Raises:
        WeightsError: it is no such head, of other sizes, or of the other activation.
    """
    state = found.get("state_dict", found)
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, Mapping) else {}
    matches = {key: _KEY.match(key) for key in tensors}
    if not tensors or None in matches.values() or len({m["prefix"] for m in matches.values() if m}) != 1:
        shown = ", ".join(list(tensors)[:3]) or "no tensors"
        raise WeightsError(
            f"{where} is no aesthetic head: it holds {shown}. The head has layers.N.weight and layers.N.bias of five "
            "linear layers. (The CLIP model below it goes into clip_weights.)"
        )
    layers = {(int(m["number"]), m["kind"]): tensors[key].float() for key, m in matches.items() if m}
    numbers = tuple(sorted({number for number, _ in layers}))
    lacking = [f"{n}.{kind}" for n in numbers for kind in ("weight", "bias") if (n, kind) not in layers]
    if numbers not in (_LINEAR, _RELU) or lacking:
        raise WeightsError(
            f"{where} is no aesthetic head that is known: its layers are {', '.join(map(str, numbers))}"
            f"{', without ' + ', '.join(lacking) if lacking else ''}; heads have {_LINEAR}, with ReLU {_RELU}."
        )
    if activation != (needed := "relu" if numbers == _RELU else "none"):
        kind = "with" if needed == "relu" else "without"
        raise WeightsError(f"{where} is a head {kind} ReLU (layers {numbers}): set the option activation: {needed}.")
    pairs = [(layers[n, "weight"], layers[n, "bias"]) for n in numbers]
    _check_sizes(pairs, where, published)
    return Head(pairs, activation)


def _check_sizes(pairs: list[tuple[Tensor, Tensor]], where: str, published: bool) -> None:
    """Check that each layer takes what the one before gives, and the last gives one number."""
    weights = [weight for weight, _ in pairs]
    sizes = " -> ".join(str(tuple(weight.shape)) for weight in weights)
    fits = all(w.ndim == 2 and b.shape == w.shape[:1] for w, b in pairs) and weights[-1].shape[0] == 1
    fits = fits and all(after.shape[1] == before.shape[0] for before, after in pairwise(weights))
    if not fits:
        raise WeightsError(f"{where}: the layers of this head do not fit each other: {sizes}.")
    widths = (weights[0].shape[1], *(weight.shape[0] for weight in weights))
    if published and widths != WIDTHS:
        raise WeightsError(
            f"{where}: this head has sizes {'-'.join(map(str, widths))}; LAION's on ViT-L/14 has "
            f"{'-'.join(map(str, WIDTHS))}. It belongs to another CLIP model."
        )
