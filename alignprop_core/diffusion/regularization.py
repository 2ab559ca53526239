"""A pull towards the base model: the squared difference of adapted and un-adapted predictions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

Off = Callable[[], AbstractContextManager[object]]


class _Frozen(torch.autograd.Function):
    """A frozen network's output: run without a graph, and once more for its input's gradient where that is asked for.

    What switches the adapters off is entered around both runs and the second one's backward pass, where a network that
    recomputes parts of itself would otherwise find them on again.
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
            latents = latents.detach().requires_grad_()
            (at_latents,) = torch.autograd.grad(ctx.network(latents), latents, gradient)
        return at_latents, None, None


def squared_difference(latents: Tensor, prediction: Tensor, base: Callable[[Tensor], Tensor], off: Off) -> Tensor:
    """Return the sum over a batch of each sample's mean squared difference between two predictions, a scalar.

    The gradient is the whole one. It reaches the adapters through `prediction`, and, where the latents hang on earlier
    kept steps, through what both predictions see; leaving out the base model's half would pull the latents to where
    the adapted network happens to predict what the base model predicted elsewhere.

    Args:
        latents: (B, C, h, w), what both networks see.
        prediction: (B, C, h, w), the adapted network's prediction there.
        base: the un-adapted, frozen network; called without a graph, and again in the backward pass if the latents
            carry one.
        off: opens a context in which the network is un-adapted.
    """
    unadapted: Tensor = _Frozen.apply(latents, base, off)
    return (prediction - unadapted).square().flatten(1).mean(1).sum()
