"""A moving average of the adapters: what is saved and evaluated, while the adapters themselves train on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The average of parameters over a run's steps: average = d * average + (1 - d) * parameters.

    d is the smaller of `decay` and (1 + n) / (10 + n) after n updates, so that the first steps, with B still near zero,
    are soon forgotten. A and B of one run are averaged each by itself: they move together and by little. LoRAs of
    different runs must never be mixed so (`alignprop lora mix`).

    Args:
        parameters: what to average; the average starts as they are.
        decay: in (0, 1).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.updates = 0
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters' present values in."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.lerp_(parameter, 1 - decay)
        self.updates += 1

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the parameters hold the average inside the block."""
        own = [parameter.detach().clone() for parameter in self.parameters]
        try:
            self.copy_to_parameters()
            yield
        finally:
            self._copy(own)

    def copy_to_parameters(self) -> None:
        """Let the parameters hold the average from here on."""
        self._copy(self.values)

    def tensors(self) -> dict[str, Tensor]:
        """Return the average for a checkpoint, numbered in the parameters' order."""
        return {str(i): value.clone() for i, value in enumerate(self.values)}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Put back what `tensors` gave, and the number of updates it had had."""
        for i, value in enumerate(self.values):
            value.copy_(tensors[str(i)])
        self.updates = updates

    @torch.no_grad()
    def _copy(self, values: Sequence[Tensor]) -> None:
        for value, parameter in zip(values, self.parameters, strict=True):
            parameter.copy_(value)
