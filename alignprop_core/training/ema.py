"""Exponential moving average (EMA) of the adapters, which is saved and evaluated in their place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Exponential moving average of parameters: average = d * average + (1 - d) * parameters.

    d is the smaller of `decay` and (1 + n) / (10 + n) after n updates, so that the first steps, with B still near zero,
    lose their weight soon. A and B are averaged separately, which is right within one run, where they change together
    and slowly; LoRAs of different runs must not be merged like this (use `alignprop lora merge`).

    Args:
        parameters: the parameters to average; the average starts at their values.
        decay: in (0, 1).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.updates = 0
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Add the parameters' present values."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.lerp_(parameter, 1 - decay)
        self.updates += 1

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the parameters the averaged values inside the block."""
        own = [parameter.detach().clone() for parameter in self.parameters]
        try:
            self.copy_to_parameters()
            yield
        finally:
            self._copy(own)

    def copy_to_parameters(self) -> None:
        """Give the parameters the averaged values."""
        self._copy(self.values)

    def tensors(self) -> dict[str, Tensor]:
        """Return the average for a checkpoint, numbered in the parameters' order."""
        return {str(i): value.clone() for i, value in enumerate(self.values)}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Restore what `tensors` returned, and the number of updates."""
        for i, value in enumerate(self.values):
            value.copy_(tensors[str(i)])
        self.updates = updates

    @torch.no_grad()
    def _copy(self, values: Sequence[Tensor]) -> None:
        for value, parameter in zip(values, self.parameters, strict=True):
            parameter.copy_(value)
