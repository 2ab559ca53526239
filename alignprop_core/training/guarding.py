"""What a run keeps beside its adapters: its guards, their moving average, and the best ones so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from alignprop_core.config.sections import RunConfig
from alignprop_core.training.ema import Average
from alignprop_core.training.guards import HeldOutGuard, StepGuard


class Guarding:
    """The guards of a run and the tensors that go with them.

    Attributes:
        steps: says which steps are dropped.
        heldout: goes by the evaluations.
        average: the adapters' moving average (`optimizer.ema_decay`), or None.
        best: the best evaluated adapters so far, as `lora.state` gives them, or None.
    """

    def __init__(
        self, config: RunConfig, parameters: Sequence[nn.Parameter], advice: Mapping[str, str] | None = None
    ) -> None:
        self.steps, self.heldout = StepGuard(config.guards, advice), HeldOutGuard(config.guards)
        decay = config.optimizer.ema_decay
        self.average = None if decay is None else Average(parameters, decay)
        self.best: dict[str, Tensor] | None = None

    def as_saved(self) -> AbstractContextManager[None]:
        """Let the adapters be what is saved and evaluated: their moving average where there is one."""
        return nullcontext() if self.average is None else self.average.swapped_in()

    def as_json(self) -> dict[str, Any]:
        """Return the numbers for a checkpoint."""
        updates = 0 if self.average is None else self.average.updates
        return {"steps": self.steps.as_json(), "heldout": self.heldout.as_json(), "averaged": updates}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors for a checkpoint."""
        parts = {"average": {} if self.average is None else self.average.tensors(), "best": self.best or {}}
        return {f"{part}/{name}": value for part, tensors in parts.items() for name, value in tensors.items()}

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Put back what `as_json` and `tensors` gave."""
        self.steps.load(state["steps"])
        self.heldout.load(state["heldout"])
        parts: dict[str, dict[str, Tensor]] = {"average": {}, "best": {}}
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = value
        self.best = parts["best"] or None
        if self.average is not None:
            self.average.load(parts["average"], int(state["averaged"]))
