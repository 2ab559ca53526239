"""The denoiser's calls for a batch: predictions, and vector-Jacobian products (VJPs) of predictions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from alignprop_core.diffusion.calls import NetworkCalls
from alignprop_core.diffusion.cpu import Weights, replaced
from alignprop_core.diffusion.families.base import Conditioning
from alignprop_core.diffusion.half import scaled
from alignprop_core.errors import RunError
from alignprop_core.lora import adapters

ADAPTER_OFF = (
    "The sample carries no gradient: the trainable adapter was off while it was generated. Sample outside of "
    "`without_lora()`."
)


@dataclass(frozen=True, eq=False)
class Batch:
    """What the denoiser's calls of one batch have in common.

    Attributes:
        conditioning: the encoded prompts of the B samples.
        weights: the tensors that adapted layers use, with their graph to the parameters; layers that are not in it use
            the parameters themselves.
        base: the same without the trainable adapter; None without regularization.
        adapter_off: whether the trainable adapter was off when they were computed.
    """

    conditioning: Conditioning
    weights: Weights
    base: Weights | None = None
    adapter_off: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of all layers."""
        return [tensor for tensors in self.weights.values() for tensor in tensors]


class Denoiser:
    """The denoiser for one batch.

    Args:
        calls: the networks.
        batch: the batch.
        fixed: copy what the calls work on, so that its addresses stay the same for other batches.

    Attributes:
        batch: the batch that calls are made for.
        parameters: the denoiser's trainable parameters.
        leaves: the batch's tensors in the network's dtype: what the calls are differentiated at.
        gradient: flat sum of all VJPs since it was set to zero, at the leaves, then at the parameters.
    """

    def __init__(self, calls: NetworkCalls, batch: Batch, *, fixed: bool = False) -> None:
        self._calls, self.batch, self.network = calls, batch, calls.family.denoiser
        self.parameters: list[nn.Parameter] = [p for p in self.network.parameters() if p.requires_grad]
        self._conditioning = batch.conditioning.clone() if fixed else batch.conditioning
        self._run = partial(calls.run, calls.family.predict, conditioning=self._conditioning)
        leaves = {
            layer: tuple(
                w.detach()
                .to(calls.network_dtype, copy=fixed)
                .requires_grad_(w.requires_grad or (fixed and any(p.requires_grad for p in layer.parameters())))
                for w in tensors
            )
            for layer, tensors in batch.weights.items()
        }
        self.leaves = [leaf for tensors in leaves.values() for leaf in tensors]
        self._wanted = [*(leaf for leaf in self.leaves if leaf.requires_grad), *self.parameters]
        self.gradient = torch.zeros(sum(t.numel() for t in self._wanted), device=calls.device, dtype=calls.dtype)
        # A backward pass needs the layers' forwards too, where blocks run again.
        self._forwards = calls.forwards_of(self.network, leaves)
        self._base_forwards = {} if fixed or batch.base is None else calls.forwards_of(self.network, batch.base)

    def predict(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Return the guided prediction at latents (B, C, h, w), without a graph."""
        with torch.no_grad():
            return self._run(latents, timestep, forwards=self._forwards)

    def with_graph(self, latents: Tensor, timestep: Tensor, *, at_input: bool) -> tuple[Tensor, Tensor]:
        """Return the network's input and its prediction with the graph between them.

        Args:
            latents: (B, C, h, w).
            timestep: 0-dim.
            at_input: whether the graph begins at the input, or only at the adapters.
        """
        inputs = latents.detach().requires_grad_(at_input)
        with torch.enable_grad():
            return inputs, self._run(inputs, timestep, forwards=self._forwards)

    def vjp(self, latents: Tensor, timestep: Tensor, at_prediction: Tensor, *, at_input: bool) -> Tensor | None:
        """Add the VJP of a prediction at the adapters to `gradient`; return its part at the latents.

        Args:
            latents: (B, C, h, w).
            timestep: 0-dim.
            at_prediction: (B, C, h, w), gradient at the prediction.
            at_input: False if the part at the latents is not needed; it may be None then.

        Raises:
            RunError: the prediction depends on no trainable parameter.
        """
        return self.pull(self.with_graph(latents, timestep, at_input=at_input), at_prediction)

    def pull(self, graph: tuple[Tensor, Tensor], at_prediction: Tensor, *, retain_graph: bool = False) -> Tensor | None:
        """Like `vjp`, through the graph of `with_graph`."""
        inputs, output = graph
        if not output.requires_grad:
            raise RunError(ADAPTER_OFF)
        factor: Tensor | float = 1.0
        if self._calls.scales_gradients:
            at_prediction, factor = scaled(at_prediction)
        wanted = [*self._wanted, *([inputs] if inputs.requires_grad else [])]
        with replaced(self._forwards):
            parts = torch.autograd.grad(
                output, wanted, at_prediction, retain_graph=retain_graph, materialize_grads=True
            )
        # Added in full precision, all layers at once.
        flat = torch.cat([part.flatten() for part in parts[: len(self._wanted)]]).to(self.gradient.dtype)
        self.gradient.add_(flat if isinstance(factor, float) else factor * flat)
        return factor * parts[-1] if inputs.requires_grad else None

    @contextmanager
    def base(self) -> Iterator[None]:
        """Inside the block, `predict` and `base_vjp` are the base model's: the trainable adapter is off."""
        before, self._forwards = self._forwards, self._base_forwards
        try:
            with adapters.disabled(self.network):
                yield
        finally:
            self._forwards = before

    def base_vjp(self, latents: Tensor, timestep: Tensor, at_prediction: Tensor) -> Tensor:
        """Return the VJP of the prediction at the latents, (B, C, h, w), inside of `base()`."""
        inputs, output = self.with_graph(latents, timestep, at_input=True)
        gradient, factor = scaled(at_prediction) if self._calls.scales_gradients else (at_prediction, 1.0)
        with replaced(self._forwards):
            return factor * torch.autograd.grad(output, inputs, gradient)[0]

    def parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the batch's tensors and the parameters, and the sum of the VJPs at each of them.

        Raises:
            RunError: the trainable adapter was off.
        """
        if self.batch.adapter_off:
            raise RunError(ADAPTER_OFF)
        sums = [t for t, leaf in zip(self.batch.tensors, self.leaves, strict=True) if leaf.requires_grad]
        # Copies: what autograd derives from them may be views, which become the parameters' `.grad`.
        found = self._split(self.gradient.clone())
        pairs = [(t, g) for t, g in zip([*sums, *self.parameters], found, strict=True) if t.requires_grad]
        return [t for t, _ in pairs], [g for _, g in pairs]

    def _split(self, flat: Tensor) -> list[Tensor]:
        pieces = torch.split(flat, [t.numel() for t in self._wanted])
        return [piece.view(t.shape) for piece, t in zip(pieces, self._wanted, strict=True)]
