"""The denoiser's calls as CUDA graphs: captured once for each shape of a batch, replayed for every step and batch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from alignprop_core.diffusion.calls import NetworkCalls
from alignprop_core.diffusion.cpu import Weights
from alignprop_core.diffusion.cuda_graphs import SHAPES, Call, Pool, obstacle, state_of
from alignprop_core.diffusion.denoiser import ADAPTER_OFF, Batch, Denoiser
from alignprop_core.errors import RunError
from alignprop_core.lora import adapters


class CapturedDenoiser(Denoiser):
    """The denoiser for batches of one shape.

    Its calls work on tensors whose addresses stay the same. Each batch copies its prompts and adapters into them; with
    the base model's values in them, the same graphs are those of the base model.

    Args:
        calls: the networks.
        batch: the first batch.
        pool: captures the calls.
    """

    def __init__(self, calls: NetworkCalls, batch: Batch, pool: Pool) -> None:
        super().__init__(calls, batch, fixed=True)
        self._pool, self._is_base = pool, False
        # Whether peft runs no adapted layer: those have the strength as a Python number, and switches that graphs lack.
        self._plain = all(layer in batch.weights for layer in self.network.modules() if isinstance(layer, LoraLayer))
        self._captured: dict[str, Call] = {}

    def load(self, batch: Batch) -> None:
        """Make the following calls those of another batch of the same shape."""
        self._conditioning.copy_(batch.conditioning)
        self._fill(batch.weights)
        self.batch = batch

    def predict(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """See `Denoiser`."""
        return self._call("predict", self._predict, latents, timestep)

    def vjp(self, latents: Tensor, timestep: Tensor, at_prediction: Tensor, *, at_input: bool) -> Tensor | None:
        """See `Denoiser`; the same graph with and without `at_input`, since it would be no faster without."""
        return self._call("vjp", self._vjp, latents, timestep, at_prediction)

    def base_vjp(self, latents: Tensor, timestep: Tensor, at_prediction: Tensor) -> Tensor:
        """See `Denoiser`."""
        return self._call("base_vjp", self._base_vjp, latents, timestep, at_prediction)

    @contextmanager
    def base(self) -> Iterator[None]:
        """See `Denoiser`."""
        assert self.batch.base is not None
        self._is_base = True
        self._fill(self.batch.base)
        try:
            with adapters.disabled(self.network):  # for layers that peft runs
                yield
        finally:
            self._is_base = False
            self._fill(self.batch.weights)

    def parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """See `Denoiser`; the graphs have a gradient even if the adapter was off."""
        if self._plain and self.leaves and not any(tensor.requires_grad for tensor in self.batch.tensors):
            raise RunError(ADAPTER_OFF)
        return super().parts()

    def not_captured(self, latents: Tensor, timestep: Tensor) -> list[Call]:
        """Return the calls of training that have yet to be captured."""
        for name, function, inputs in (
            ("vjp", self._vjp, (latents, timestep, latents)),
            ("predict", self._predict, (latents, timestep)),
        ):
            self._captured.setdefault(name, Call(function, inputs))
        return [self._captured[name] for name in ("vjp", "predict") if self._captured[name].graph is None]

    def capture(self, calls: Sequence[Call]) -> None:
        """Capture calls, some of which are this denoiser's."""
        if calls:
            before = self.gradient.clone()  # trials must not add to it
            try:
                self._pool.capture(calls)
            finally:
                self.gradient.copy_(before)

    def release(self) -> None:
        """Free the graphs."""
        for call in self._captured.values():
            call.graph = None

    def _call(self, name: str, function: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> Tensor:
        """Call a function: its graph, captured at the first use, or the function itself."""
        if not self._pool.enabled or (self._is_base and not self._plain):
            return function(*inputs)[0]
        call = self._captured.setdefault(name, Call(function, inputs))
        if call.graph is None:
            self.capture([call])
        return call(*inputs)[0]

    def _predict(self, latents: Tensor, timestep: Tensor) -> Sequence[Tensor]:
        return [super().predict(latents, timestep)]

    def _vjp(self, latents: Tensor, timestep: Tensor, at_prediction: Tensor) -> Sequence[Tensor]:
        found = super().vjp(latents, timestep, at_prediction, at_input=True)
        assert found is not None
        return [found]

    def _base_vjp(self, latents: Tensor, timestep: Tensor, at_prediction: Tensor) -> Sequence[Tensor]:
        return [super().base_vjp(latents, timestep, at_prediction)]

    def _fill(self, weights: Weights) -> None:
        with torch.no_grad():
            for leaf, tensor in zip(self.leaves, (t for ts in weights.values() for t in ts), strict=True):
                leaf.copy_(tensor)


class Denoisers:
    """The denoiser for batches of every shape.

    Args:
        calls: the networks.
        pool: captures the denoiser's calls; if it is not enabled, they run eagerly.
    """

    def __init__(self, calls: NetworkCalls, pool: Pool) -> None:
        self._calls, self._pool = calls, pool
        self._known: OrderedDict[Any, CapturedDenoiser] = OrderedDict()

    def of(self, batch: Batch, *, captured: bool = True) -> Denoiser:
        """Return the denoiser for a batch, with captured calls if there has been one of its shape.

        Args:
            batch: the batch.
            captured: False for calls that run eagerly, because their graphs are stored.
        """
        network = self._calls.family.denoiser
        if self._pool.enabled and (reason := obstacle(network)) is not None:
            self._pool.refuse(reason)
        if not self._pool.enabled:
            self._known.clear()
        if not self._pool.enabled or not captured:
            return Denoiser(self._calls, batch)
        key = (batch.conditioning.shapes, state_of(network), _layers(network, batch.weights))
        denoiser = self._known.pop(key, None)
        if denoiser is None:
            with torch.inference_mode(False):  # its tensors last: later batches may need gradients
                denoiser = CapturedDenoiser(self._calls, batch, self._pool)
        self._known[key] = denoiser
        while len(self._known) > SHAPES:
            self._known.popitem(last=False)[1].release()
        if denoiser.batch is not batch:
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
