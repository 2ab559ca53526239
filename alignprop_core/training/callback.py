"""What watches a run, and what it is shown of each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignprop_core.training.trainer import Trainer


class Callback:
    """Watches a run; override what you need. Callbacks run on the main process only."""

    def on_start(self, trainer: Trainer) -> None:
        """Run once, before the first step; the run folder exists."""

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Run after each optimizer step."""

    def on_evaluation(self, trainer: Trainer, figures: Mapping[str, Any]) -> None:
        """Run after each evaluation while training (`evaluation.every`).

        `figures` holds `scores` (label -> n, mean, std), the mix's total `reward`, `drift` and `diversity`.
        """

    def on_end(self, trainer: Trainer) -> None:
        """Run once, after the last step."""

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        """Run when the run fails or is interrupted, before the error goes on."""

    def on_results(self, folder: Path) -> None:
        """Run after `alignprop evaluate` wrote result files into a folder, a run's or one that `--output` names.

        There is no run then: only automatic callbacks of plugins are called, and no other method of theirs.
        """


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step did; the line of metrics.jsonl.

    Attributes:
        step: number of the step, from 1.
        reward: mean total of the mix.
        terms: label -> batch means "raw" and "weighted"; "factor": what the score within its limits was multiplied
            with; "held": share of images at a limit; "grad_norm": norm of the term's gradient at the images; "share":
            its part of the final direction (parts add up to 1; null without a direction).
        grad_norm: norm of the adapters' gradient before clipping.
        learning_rate: the rate used.
        kept_steps: denoising steps that kept their gradient.
        reward_queries: images scored since the run began.
        seconds: wall time of the step.
        peak_memory: bytes: most memory allocated so far on the GPU, or held by the process on a CPU.
        cosines: "label | label" -> cosine of the two terms' gradients where they are combined; null without one.
        idle: why this step changed nothing on purpose, such as every image at its ceiling; null if it did.
        regularization: what the pull towards the base model took off the mean objective; 0 where it is off.
        dropped: why this step did not change the adapters; None if it did.
    """

    step: int
    reward: float
    terms: Mapping[str, Mapping[str, float | None]]
    grad_norm: float
    learning_rate: float
    kept_steps: int
    reward_queries: int
    seconds: float
    peak_memory: int
    cosines: Mapping[str, float | None] = field(default_factory=dict)
    idle: str | None = None
    regularization: float = 0.0
    dropped: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        return dict(vars(self))
