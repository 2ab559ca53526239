"""From final latents to images, differentiably; on CUDA as two CUDA graphs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from alignprop_core.diffusion.calls import NetworkCalls
from alignprop_core.diffusion.cpu import Forwards
from alignprop_core.diffusion.cuda_graphs import SHAPES, Call, Pool, obstacle, state_of
from alignprop_core.diffusion.half import with_scaled_gradient
from alignprop_core.diffusion.memory import Memory

_LAYERS = ("ResnetBlock2D", "Attention", "Upsample2D", "AutoencoderTinyBlock")
"""diffusers classes that decoders consist of."""


class Decoder:
    """Decodes latents.

    Args:
        calls: the networks.
        pool: captures the decoder; if it is not enabled, the decoder runs eagerly.
        memory: decides whether the decoder's layers run again in the backward pass.
    """

    def __init__(self, calls: NetworkCalls, pool: Pool, memory: Memory) -> None:
        self._calls, self._pool, self._memory = calls, pool, memory
        self._known: OrderedDict[Any, CapturedDecoder] = OrderedDict()

    def __call__(self, latents: Tensor) -> Tensor:
        """Return images (b, 3, H, W) in [0, 1] of latents (b, C, h, w), clipped with a straight-through gradient."""
        differentiable = torch.is_grad_enabled() and latents.requires_grad
        recomputes = differentiable and self._memory.recomputes_decoder(len(latents))
        captured = self._for(latents, recomputes) if differentiable and self._pool.enabled else None
        if captured is not None:
            self._pool.capture(captured.not_captured())
        if captured is not None and self._pool.enabled:
            pixels = _Decode.apply(latents, captured)
        else:
            pixels = self.pixels(latents, recomputes)
        # The value of clamp; the difference is 0 and has the gradient of the identity.
        images: Tensor = pixels.detach().clamp(0, 1) + (pixels - pixels.detach())
        return images

    def pixels(self, latents: Tensor, recomputes: bool) -> Tensor:
        """Return pixels (b, 3, H, W) that are not clipped, without CUDA graphs."""
        network = self._calls.family.decoder
        forwards = self._calls.forwards_of(network)
        if recomputes:
            forwards = recomputing(network, forwards)
        decode = partial(self._calls.run, self._calls.family.decode, forwards=forwards)
        return with_scaled_gradient(decode, latents) if self._calls.scales_gradients else decode(latents)

    def not_captured(self, latents: Tensor) -> list[Call]:
        """Return the calls for latents of this shape that have yet to be captured."""
        captured = self._for(latents, self._memory.recomputes_decoder(len(latents))) if self._pool.enabled else None
        return [] if captured is None else captured.not_captured()

    def _for(self, latents: Tensor, recomputes: bool) -> CapturedDecoder | None:
        """Return the calls for latents of this shape; None if they cannot be captured."""
        network = self._calls.family.decoder
        if any(isinstance(module, LoraLayer) for module in network.modules()):
            return None
        if (reason := obstacle(network)) is not None:
            self._pool.refuse(reason)
            self._known.clear()
            return None
        key = (latents.shape, recomputes, state_of(network))
        if key not in self._known:
            with torch.no_grad():
                pixels = self.pixels(latents, recomputes)  # for their shape
            pixels_of = partial(self.pixels, recomputes=recomputes)
            self._known[key] = CapturedDecoder(pixels_of, latents, pixels, self._pool)
        self._known.move_to_end(key)
        while len(self._known) > SHAPES:
            self._known.popitem(last=False)[1].release()
        return self._known[key]


def recomputing(network: nn.Module, forwards: Forwards) -> Forwards:
    """Return forwards of a decoder whose layers run again in the backward pass, each alone.

    diffusers' own gradient checkpointing runs all layers of one resolution again together, which needs about twice as
    much memory for the highest resolution.

    Args:
        network: the decoder.
        forwards: other forwards of its layers; inside of a layer that runs again they would be gone by then, and are
            left out.
    """
    layers = [module for module in network.modules() if type(module).__name__ in _LAYERS]
    inside = {module for layer in layers for module in layer.modules() if module is not layer}
    again = {
        layer: partial(checkpoint, forwards.get(layer, layer.forward), use_reentrant=False, preserve_rng_state=False)
        for layer in layers
    }
    return {module: forward for module, forward in forwards.items() if module not in inside} | again


class CapturedDecoder:
    """A decoder for latents of one shape: its forward and its backward pass.

    Args:
        pixels_of: the decoder, differentiable.
        latents: latents of this shape.
        pixels: pixels of their shape.
        pool: captures them.

    Attributes:
        forward: latents -> pixels; leaves the activations in the pool's memory.
        backward: gradient at the pixels -> gradient at the latents, with these activations.
    """

    def __init__(self, pixels_of: Callable[[Tensor], Tensor], latents: Tensor, pixels: Tensor, pool: Pool) -> None:
        self.pool, self._pixels_of = pool, pixels_of
        self._graph: tuple[Tensor, Tensor] | None = None  # the ends of autograd's graph, while capturing
        self.forward = Call(self._forward, (latents.detach(),))
        self.backward = Call(self._backward, (pixels,))

    def not_captured(self) -> list[Call]:
        """Return both calls if they have yet to be captured."""
        return [self.forward, self.backward] if self.forward.graph is None else []

    def release(self) -> None:
        """Free the graphs."""
        self.forward.graph = self.backward.graph = None

    def _forward(self, latents: Tensor) -> Sequence[Tensor]:
        inputs = latents.detach().requires_grad_()
        with torch.enable_grad():
            self._graph = inputs, self._pixels_of(inputs)
        return [self._graph[1].detach()]

    def _backward(self, at_pixels: Tensor) -> Sequence[Tensor]:
        assert self._graph is not None
        inputs, pixels = self._graph
        # The graph is kept until all is captured, so that the backward pass does not overwrite the activations: it can
        # be replayed for several terms. Replays need the memory, not the tensors.
        found = torch.autograd.grad(pixels, inputs, at_pixels, retain_graph=True)
        self._graph = None
        return found


class _Decode(torch.autograd.Function):
    """(latents, decoder) -> pixels, differentiable once, as often as needed."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, decoder: CapturedDecoder) -> Tensor:
        """Decode; the activations stay in the graphs' memory until the next replay of another graph."""
        ctx.decoder = decoder
        ctx.save_for_backward(latents)
        (pixels,) = decoder.forward(latents)
        ctx.replays = decoder.pool.replays
        return pixels

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, at_pixels: Tensor) -> tuple[Tensor, None]:
        """Return the gradient at the latents."""
        decoder: CapturedDecoder = ctx.decoder
        if ctx.replays != decoder.pool.replays or decoder.forward.graph is None:
            decoder.forward(*ctx.saved_tensors)  # the activations have been overwritten
        (at_latents,) = decoder.backward(at_pixels)
        ctx.replays = decoder.pool.replays
        return at_latents, None
