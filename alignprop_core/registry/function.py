"""Functions as rewards, with the signatures that TRL's reward functions have."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from alignprop_core.errors import PluginError
from alignprop_core.reward import ImageBatch, Reward

_GIVEN = ("images", "prompts", "metadata")
_SIGNATURES = "(images), (images, prompts) or (images, prompts, metadata)"


class FunctionReward(Reward):
    """A function as a reward.

    Args:
        function: takes `(images)`, `(images, prompts)` or `(images, prompts, metadata)`, as in an `ImageBatch`, and
            returns scores of shape (B,), or a pair of scores and a dict, which is ignored.

    Raises:
        PluginError: the function has another signature.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.count = _count(function)

    def score(self, batch: ImageBatch) -> Tensor:
        """Call the function."""
        found: Any = self.function(*(batch.images, list(batch.prompts), list(batch.metadata))[: self.count])
        scores: Tensor = found[0] if isinstance(found, tuple) and len(found) == 2 else found
        return scores


def _count(function: Callable[..., Any]) -> int:
    """Return how many of images, prompts and metadata a function takes."""
    signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    parameters = signature.parameters.values()
    # A parameter with a default is given a value only if its name says which.
    positional = [
        p
        for i, p in enumerate(parameters)
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        and (p.default is p.empty or (i < len(_GIVEN) and p.name == _GIVEN[i]))
    ]
    required = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    count = len(_GIVEN) if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(positional)
    if not 1 <= count <= len(_GIVEN) or len(positional) > len(_GIVEN) or required:
        raise PluginError(f"the function takes {signature}; it must take {_SIGNATURES}.")
    return count
