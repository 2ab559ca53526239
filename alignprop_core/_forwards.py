"""Modules that compute the same thing another way for a while: replace `forward`, and put it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Forwards = Mapping[nn.Module, Callable[..., Tensor]]
"""Module -> the function that stands in for its `forward`."""


@contextmanager
def replaced(forwards: Forwards) -> Iterator[None]:
    """Let each module compute with its stand-in inside the block."""
    before: dict[Any, Any] = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


def recomputes(network: nn.Module) -> bool:
    """Whether a network checkpoints parts of itself: it would run them again in the backward pass, outside any
    `replaced` block, and find another graph there."""
    return any(getattr(module, "gradient_checkpointing", False) for module in network.modules())
