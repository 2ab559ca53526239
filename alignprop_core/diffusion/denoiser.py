"""The denoiser's calls for a batch: predictions, and vector-Jacobian products (VJPs) of predictions.

On CUDA both are captured as CUDA graphs, once for each shape of a batch, and replayed for every step and batch after.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from alignprop_core.diffusion.calls import NetworkCalls
from alignprop_core.diffusion.cpu import Weights, replaced
from alignprop_core.diffusion.cuda_graphs import Call, Pool, obstacle, state_of
from alignprop_core.diffusion.families.base import Conditioning
from alignprop_core.diffusion.half import scaled
from alignprop_core.errors import RunError
from alignprop_core.lora import adapters

_SHAPES = 4
"""Number of shapes whose graphs are kept: a run has its batch's, and perhaps those of a last, smaller one."""

_OFF = (
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
    """

    conditioning: Conditioning
    weights: Weights
    base: Weights | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of all layers."""
        return [tensor for tensors in self.weights.values() for tensor in tensors]


class Denoiser:
    """The denoiser for batches of one shape.

    Args:
        calls: the networks.
        pool: captures the calls; if it is not enabled, they run eagerly.
        batch: the first batch.

    Attributes:
        parameters: the denoiser's trainable parameters.
        leaves: copies of the batch's tensors in the network's dtype: what the calls are differentiated at.
        gradient: flat sum of all VJPs since it was set to zero, at the leaves, then at the parameters.
    """

    def __init__(self, calls: NetworkCalls, pool: Pool, batch: Batch) -> None:
        self._calls, self._pool, self.network = calls, pool, calls.family.denoiser
        self.parameters: list[nn.Parameter] = [p for p in self.network.parameters() if p.requires_grad]
        self._fixed = fixed = pool.enabled  # a graph's tensors keep their addresses
        self._conditioning = batch.conditioning.clone() if fixed else batch.conditioning
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
        self._sums = self._split(self.gradient)
        # A backward pass needs the layers' forwards too, where blocks run again.
        self._forwards = calls.forwards_of(self.network, leaves)
        self._base_forwards = {} if fixed or batch.base is None else calls.forwards_of(self.network, batch.base)
        self._plain = all(layer in batch.weights for layer in self.network.modules() if isinstance(layer, LoraLayer))
        self._captured: dict[str, Call] = {}
        self._batch, self._is_base = batch, False

    def load(self, batch: Batch) -> None:
        """Make the following calls those of this batch."""
        if batch is not self._batch:
            self._conditioning.copy_(batch.conditioning)
            self._fill(batch.weights)
            self._batch = batch

    def _fill(self, weights: Weights) -> None:
        with torch.no_grad():
            for leaf, tensor in zip(self.leaves, (t for ts in weights.values() for t in ts), strict=True):
                leaf.copy_(tensor)

    def not_captured(self, latents: Tensor, timestep: Tensor) -> list[Call]:
        """Return the calls of training that have yet to be captured."""
        calls = {
            "vjp": Call(partial(self._vjp, at_input=True), (latents, timestep, latents)),
            "predict": Call(self._predict, (latents, timestep)),
        }
        new = {name: call for name, call in calls.items() if name not in self._captured}
        self._captured |= new
        return list(new.values())

    # -- calls --------------------------------------------------------------------------------------------------

    def predict(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Return the guided prediction at latents (B, C, h, w), without a graph."""
        return self._call("predict", self._predict, latents, timestep)[0]

    def with_graph(self, latents: Tensor, timestep: Tensor, *, at_input: bool) -> tuple[Tensor, Tensor]:
        """Return the network's input and its prediction with the graph between them.

        Args:
            latents: (B, C, h, w).
            timestep: 0-dim.
            at_input: whether the graph begins at the input, or only at the adapters.
        """
        inputs = latents.detach().requires_grad_(at_input)
        with torch.enable_grad():
            return inputs, self._run(inputs, timestep)

    def vjp(self, latents: Tensor, timestep: Tensor, at_prediction: Tensor, *, at_input: bool) -> Tensor | None:
        """Add the VJP of a prediction at the adapters to `gradient`; return its part at the latents if `at_input`.

        Args:
            latents: (B, C, h, w).
            timestep: 0-dim.
            at_prediction: (B, C, h, w), gradient at the prediction.
            at_input: False if the gradient at the latents is not needed.

        Raises:
            RunError: the prediction depends on no trainable parameter.
        """
        if self._captures:  # one graph for both cases: without the latents it would be no faster
            at_input = True
        found = self._call("vjp", partial(self._vjp, at_input=at_input), latents, timestep, at_prediction)
        return found[0] if found else None

    def pull(self, graph: tuple[Tensor, Tensor], at_prediction: Tensor, *, again: bool = False) -> Tensor | None:
        """Like `vjp`, through the graph of `with_graph`; `again`: the graph is kept."""
        inputs, output = graph
        if not output.requires_grad:
            raise RunError(_OFF)
        factor: Tensor | float = 1.0
        if self._calls.scales_gradients:
            at_prediction, factor = scaled(at_prediction)
        wanted = [*self._wanted, *([inputs] if inputs.requires_grad else [])]
        with replaced(self._forwards):
            found = torch.autograd.grad(output, wanted, at_prediction, retain_graph=again, allow_unused=True)
        for total, part in zip(self._sums, found, strict=False):
            if part is not None:  # half-precision parts are added up in full precision
                total.add_(part if isinstance(factor, float) else factor * part.to(total.dtype))
        return factor * found[-1] if inputs.requires_grad else None

    @contextmanager
    def base(self) -> Iterator[None]:
        """Inside the block, `predict` and `base_vjp` are the base model's: the trainable adapter is off."""
        assert self._batch.base is not None
        before, self._is_base = self._forwards, True
        if self._fixed:
            self._fill(self._batch.base)
        else:
            self._forwards = self._base_forwards
        try:
            # For layers that use the parameters themselves.
            with adapters.disabled(self.network):
                yield
        finally:
            self._forwards, self._is_base = before, False
            if self._fixed:
                self._fill(self._batch.weights)

    def base_vjp(self, latents: Tensor, timestep: Tensor, at_prediction: Tensor) -> Tensor:
        """Return the VJP of the prediction at the latents, (B, C, h, w), inside of `base()`."""
        return self._call("base_vjp", self._input_vjp, latents, timestep, at_prediction)[0]

    def parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the batch's tensors and the parameters, and the sum of the VJPs at each of them.

        Raises:
            RunError: the batch's tensors depend on no trainable parameter.
        """
        sums = [t for t, leaf in zip(self._batch.tensors, self.leaves, strict=True) if leaf.requires_grad]
        if self._plain and sums and not any(t.requires_grad for t in sums):
            raise RunError(_OFF)
        # Copies: what autograd derives from them may be views, which become the parameters' `.grad`.
        found = self._split(self.gradient.clone())
        pairs = [(t, g) for t, g in zip([*sums, *self.parameters], found, strict=True) if t.requires_grad]
        return [t for t, _ in pairs], [g for _, g in pairs]

    # -- inside -------------------------------------------------------------------------------------------------

    def _split(self, flat: Tensor) -> list[Tensor]:
        pieces = torch.split(flat, [t.numel() for t in self._wanted])
        return [piece.view(t.shape) for piece, t in zip(pieces, self._wanted, strict=True)]

    def _run(self, inputs: Tensor, timestep: Tensor) -> Tensor:
        predict = self._calls.family.predict
        return self._calls.run(predict, inputs, timestep, conditioning=self._conditioning, forwards=self._forwards)

    def _predict(self, latents: Tensor, timestep: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            return [self._run(latents, timestep)]

    def _vjp(self, latents: Tensor, timestep: Tensor, at_prediction: Tensor, *, at_input: bool) -> Sequence[Tensor]:
        found = self.pull(self.with_graph(latents, timestep, at_input=at_input), at_prediction)
        return [] if found is None else [found]

    def _input_vjp(self, latents: Tensor, timestep: Tensor, at_prediction: Tensor) -> Sequence[Tensor]:
        inputs, output = self.with_graph(latents, timestep, at_input=True)
        gradient, factor = scaled(at_prediction) if self._calls.scales_gradients else (at_prediction, 1.0)
        with replaced(self._forwards):
            return [factor * torch.autograd.grad(output, inputs, gradient)[0]]

    @property
    def _captures(self) -> bool:
        return self._pool.enabled and not (self._is_base and not self._plain)

    def _call(self, name: str, function: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> Sequence[Tensor]:
        """Call a function: its graph, captured at the first use, or the function itself."""
        if not self._captures:
            return function(*inputs)
        if name not in self._captured:
            self._captured[name] = Call(function, inputs)
            self.capture([self._captured[name]])
        return self._captured[name](*inputs)

    def capture(self, calls: Sequence[Call]) -> None:
        """Capture calls, some of which are this denoiser's."""
        if not calls:
            return
        before = self.gradient.clone()  # trials must not add to it
        self._pool.capture(calls)
        self.gradient.copy_(before)


class Denoisers:
    """The denoiser for batches of every shape.

    Args:
        calls: the networks.
        pool: captures the calls.
    """

    def __init__(self, calls: NetworkCalls, pool: Pool) -> None:
        self._calls, self._pool = calls, pool
        self._known: OrderedDict[Any, Denoiser] = OrderedDict()

    def of(self, batch: Batch) -> Denoiser:
        """Return the denoiser that has captured calls for such a batch, or a new one."""
        network = self._calls.family.denoiser
        if self._pool.enabled and (reason := obstacle(network)) is not None:
            self._pool.refuse(reason)
        if not self._pool.enabled:
            return Denoiser(self._calls, self._pool, batch)
        key = (batch.conditioning.shapes, state_of(network), _layers(network, batch.weights))
        denoiser = self._known.pop(key, None) or Denoiser(self._calls, self._pool, batch)
        self._known[key] = denoiser
        while len(self._known) > _SHAPES:
            self._known.popitem(last=False)
        denoiser.load(batch)
        return denoiser


def _layers(network: nn.Module, weights: Weights) -> tuple[Any, ...]:
    """Return what captured calls depend on in the adapted layers: shapes, or the settings of layers that peft runs."""
    found: list[Any] = [(id(layer), tuple(t.shape for t in tensors)) for layer, tensors in weights.items()]
    for layer in network.modules():
        if isinstance(layer, LoraLayer) and layer not in weights:
            settings: Any = layer
            state = (settings.disable_adapters, *settings.active_adapters, *settings.merged_adapters)
            found.append((id(layer), state, tuple(settings.scaling.items())))
    return tuple(found)
