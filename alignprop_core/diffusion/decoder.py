"""From final latents to images, differentiably; on CUDA as two CUDA graphs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.autograd.function import once_differentiable

from alignprop_core.diffusion.calls import NetworkCalls
from alignprop_core.diffusion.cuda_graphs import Pool, obstacle, state_of
from alignprop_core.diffusion.half import with_scaled_gradient
from alignprop_core.diffusion.memory import Memory

_SHAPES = 2
"""Number of shapes whose graphs are kept: a chunk's, and that of a last, smaller one."""


class Decoder:
    """Decodes latents.

    Args:
        calls: the networks.
        pool: captures the decoder; if it is not enabled, the decoder runs eagerly.
        memory: decides whether the decoder's blocks run again in the backward pass.
    """

    def __init__(self, calls: NetworkCalls, pool: Pool, memory: Memory) -> None:
        self._calls, self._pool, self._memory = calls, pool, memory
        self._known: OrderedDict[Any, CapturedDecoder | None] = OrderedDict()

    def __call__(self, latents: Tensor) -> Tensor:
        """Return images (b, 3, H, W) in [0, 1] of latents (b, C, h, w), clipped with a straight-through gradient."""
        recomputes = False
        if torch.is_grad_enabled():
            recomputes = self._memory.recomputes("decoder", len(latents))
        captured = self._captured(latents, recomputes) if torch.is_grad_enabled() and latents.requires_grad else None
        pixels = self._differentiable(latents, recomputes) if captured is None else _Decode.apply(latents, captured)
        # The value of clamp; the difference is 0 and has the gradient of the identity.
        images: Tensor = pixels.detach().clamp(0, 1) + (pixels - pixels.detach())
        return images

    def pixels(self, latents: Tensor, recomputes: bool) -> Tensor:
        """Return pixels (b, 3, H, W) that are not clipped, without CUDA graphs."""
        # A decoder that runs again in the backward pass keeps its own forwards: these here are gone by then.
        forwards = {} if recomputes else self._calls.forwards_of(self._calls.family.decoder)
        return self._calls.run(self._calls.family.decode, latents, forwards=forwards)

    def _differentiable(self, latents: Tensor, recomputes: bool) -> Tensor:
        pixels_of = partial(self.pixels, recomputes=recomputes)
        return with_scaled_gradient(pixels_of, latents) if self._calls.scales_gradients else pixels_of(latents)

    def _captured(self, latents: Tensor, recomputes: bool) -> CapturedDecoder | None:
        """Return the graphs for latents of this shape, captured at their first use; None if there are none."""
        network = self._calls.family.decoder
        if not self._pool.enabled or any(isinstance(module, LoraLayer) for module in network.modules()):
            return None
        if (reason := obstacle(network)) is not None:
            self._pool.refuse(reason)
            return None
        key = (latents.shape, recomputes, state_of(network))
        if key not in self._known:
            with torch.no_grad():
                pixels = self.pixels(latents, recomputes)  # for their shape
            pixels_of = partial(self._differentiable, recomputes=recomputes)
            captured = CapturedDecoder(pixels_of, latents, pixels, self._pool)
            self._known[key] = captured if captured.graphs else None
        self._known.move_to_end(key)
        while len(self._known) > _SHAPES:
            self._known.popitem(last=False)
        return self._known[key]


class CapturedDecoder:
    """A decoder for latents of one shape as CUDA graphs of its forward and its backward pass.

    Args:
        pixels_of: the decoder, differentiable.
        latents: latents of this shape.
        pixels: pixels of their shape.
        pool: captures them.

    Attributes:
        graphs: the forward and the backward pass; empty if capturing failed.
    """

    def __init__(self, pixels_of: Any, latents: Tensor, pixels: Tensor, pool: Pool) -> None:
        self.pool = pool
        self._kept: tuple[Tensor, Tensor] | None = None  # with the graph between them, whose tensors replays fill

        def forward(given: Tensor) -> Sequence[Tensor]:
            self._kept = None  # frees what a trial has left
            inputs = given.detach().requires_grad_()
            with torch.enable_grad():
                self._kept = inputs, pixels_of(inputs)
            return [self._kept[1]]

        def backward(at_pixels: Tensor) -> Sequence[Tensor]:
            assert self._kept is not None
            return torch.autograd.grad(self._kept[1], self._kept[0], at_pixels, retain_graph=True)

        self.graphs = pool.capture([forward, backward], [[latents], [pixels]])


class _Decode(torch.autograd.Function):
    """(latents, decoder) -> pixels, differentiable once, as often as needed."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, decoder: CapturedDecoder) -> Tensor:
        """Decode; the activations stay in the graphs' memory until the next replay of another graph."""
        ctx.decoder = decoder
        ctx.save_for_backward(latents)
        (pixels,) = decoder.graphs[0](latents)
        ctx.replays = decoder.pool.replays
        return pixels

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, at_pixels: Tensor) -> tuple[Tensor, None]:
        """Return the gradient at the latents."""
        decoder: CapturedDecoder = ctx.decoder
        if ctx.replays != decoder.pool.replays:
            decoder.graphs[0](*ctx.saved_tensors)  # the activations have been overwritten
        (at_latents,) = decoder.graphs[1](at_pixels)
        # The backward graph reads the activations and keeps them, but overwrites those of all others.
        ctx.replays = decoder.pool.replays
        return at_latents, None
