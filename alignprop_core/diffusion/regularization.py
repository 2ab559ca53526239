"""Regularization toward the base model: the squared difference of adapted and base predictions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

Off = Callable[[], AbstractContextManager[object]]


class _Frozen(torch.autograd.Function):
    """A frozen network's output: computed without a graph, and again with one if the backward pass needs its gradient.

    The adapters are off in both forward passes and in the second one's backward pass: a network with gradient
    checkpointing inside runs parts of itself again there and would otherwise use the adapters.
    """

    @staticmethod
    def forward(ctx: Any, latents: Tensor, network: Callable[[Tensor], Tensor], off: Off) -> Tensor:
        ctx.network, ctx.off = network, off
        ctx.save_for_backward(latents)
        with off():
            return network(latents)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (latents,) = ctx.saved_tensors
        with ctx.off(), torch.enable_grad():
            # Only the vector-Jacobian product at the latents: nothing in the network is trainable with adapters off.
            latents = latents.detach().requires_grad_()
            (at_latents,) = torch.autograd.grad(ctx.network(latents), latents, gradient)
        return at_latents, None, None


def squared_difference(latents: Tensor, prediction: Tensor, base: Callable[[Tensor], Tensor], off: Off) -> Tensor:
    """Return sum_b mean((prediction_b - base(latents)_b)^2), a scalar, with its full gradient.

    The gradient reaches the adapters through `prediction` and, if the latents depend on earlier kept steps, through
    the input of both networks. Without the base network's part of it, the latents would be pulled to where the adapted
    prediction equals a constant, instead of to where the two predictions agree.

    Args:
        latents: (B, C, h, w), input of both networks.
        prediction: (B, C, h, w), the adapted network's prediction.
        base: the frozen base network; called without a graph, and again in the backward pass if the latents have one.
        off: opens a context in which the adapters are off.
    """
    unadapted: Tensor = _Frozen.apply(latents, base, off)
    # Mean over (C, h, w), sum over B: chunks of a batch add up to the batch's.
    return (prediction - unadapted).square().flatten(1).mean(1).sum()
