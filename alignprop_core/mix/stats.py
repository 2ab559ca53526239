"""Statistics of one optimizer step, from the mix's sums on the device to the line of metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

_SCALARS = ("images", "samples", "moving", "total", "regularization", "grad_norm")
_PER_TERM = ("raw", "raw_square", "weighted", "factor", "saturated", "size_square", "image_square", "share")


@dataclass
class StepStats:
    """Statistics of one optimizer step.

    While the step runs, `sums` collects sums over samples on the device: plain addition joins chunks and batches, an
    all-reduce joins processes. `to_host` brings them to the CPU in one transfer; only then the properties below are
    read. The trainer sets the other attributes.

    Layout of `sums`, S scalars then P values for each of K terms, then a (K, K) matrix:

        images          images scored
        samples         samples of the batch; fewer than images with LV samples
        moving          (image, term) pairs whose gradient and factor are not zero
        total           the mix's objective
        regularization  losses beside the rewards
        grad_norm       norm of the adapters' gradient before clipping (set once, not summed)
        raw, raw_square raw scores and their squares
        weighted        what the terms contribute to the objective
        factor          what the clipped scores are multiplied by
        saturated       images clipped at a ceiling, floor or target
        size_square     squared norm of the raw score's gradient where terms are balanced
        image_square    squared norm of the clipped score's gradient at the image
        share           product of the term's part of the mixed gradient with the whole
        gram            products of the clipped scores' gradients where terms are balanced

    Attributes:
        labels: labels of the K terms.
        sums: (S + P K + K K,) float64 (float32 on an Apple GPU).
        step: number of the step, from 1.
        learning_rate: the learning rate used.
        kept_steps: denoising steps that kept their gradient.
        reward_queries: images scored since the run began.
        seconds: wall time of the step.
        peak_memory: bytes: peak memory reserved so far on the GPU, or used by the process on a CPU.
        predicted: seconds and peak_memory as predicted before the first step, on a GPU; only with the first step.
        idle: why no image has a gradient, such as every image at its ceiling; None if one has.
        skipped: why this step did not change the adapters; None if it did.
    """

    labels: tuple[str, ...]
    sums: Tensor
    step: int = 0
    learning_rate: float = 0.0
    kept_steps: int = 0
    reward_queries: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    predicted: dict[str, float] | None = None
    idle: str | None = None
    skipped: str | None = None

    @classmethod
    def zeros(cls, labels: Sequence[str], device: torch.device) -> StepStats:
        """Return statistics in which every sum is 0."""
        terms = len(labels)
        # float64, because variances subtract sums of nearly equal size; Apple GPUs have no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        size = len(_SCALARS) + len(_PER_TERM) * terms + terms * terms
        return cls(tuple(labels), torch.zeros(size, device=device, dtype=dtype))

    def __getitem__(self, name: str) -> Tensor:
        """Return the view of a sum: () of a scalar, (K,) of a value per term, (K, K) of the matrix."""
        terms = len(self.labels)
        if name in _SCALARS:
            return self.sums[_SCALARS.index(name)]
        if name in _PER_TERM:
            return self.sums[len(_SCALARS) :].narrow(0, _PER_TERM.index(name) * terms, terms)
        if name == "gram":
            return self.sums[-terms * terms :].view(terms, terms)
        raise KeyError(name)

    def __setitem__(self, name: str, value: Tensor | float) -> None:
        """Set a sum in place."""
        if isinstance(value, Tensor):
            self[name].copy_(value)
        else:
            self[name].fill_(value)

    def __add__(self, other: StepStats) -> StepStats:
        return replace(self, sums=self.sums + other.sums.to(self.sums))

    # -- on the host ----------------------------------------------------------------------------------------------

    @property
    def images(self) -> int:
        """Images scored."""
        return int(self["images"])

    @property
    def total(self) -> float:
        """Mean over the images of the mix's objective."""
        return float(self["total"]) / self.images

    @property
    def moving(self) -> bool:
        """Whether any image has a gradient under any term."""
        return bool(self["moving"]) and bool(self["image_square"].any())

    @property
    def grad_norm(self) -> float:
        """Norm of the adapters' gradient before clipping."""
        return float(self["grad_norm"])

    @property
    def regularization(self) -> float:
        """Mean over the samples of the losses that are subtracted from the objective."""
        return float(self["regularization"]) / max(float(self["samples"]), 1.0)

    @cached_property
    def terms(self) -> dict[str, dict[str, float | None]]:
        """Label -> batch statistics of the term.

        "raw", "weighted", "factor" and "saturated" are means over the images; "grad_norm" is the norm of the term's
        gradient at the images; "share" is its part of the mixed gradient (shares add up to 1; None where the mixed
        gradient is zero).
        """
        means = {name: (self[name] / self.images).tolist() for name in ("raw", "weighted", "factor")}
        saturated = (self["saturated"] / self.images).tolist()
        norms, shares = self["image_square"].sqrt().tolist(), self["share"].tolist()
        whole = sum(shares)
        return {
            label: {
                **{name: values[i] for name, values in means.items()},
                "saturated": saturated[i],
                "grad_norm": norms[i],
                # Where the terms cancel out, shares are undefined.
                "share": shares[i] / whole if whole > 0 else None,
            }
            for i, label in enumerate(self.labels)
        }

    @cached_property
    def cosines(self) -> dict[str, float | None]:
        """ "label | label" -> cosine of the two terms' gradients; None where one of them is zero."""
        gram = self["gram"].tolist()
        return {
            f"{self.labels[i]} | {self.labels[j]}": _cosine(gram[i][j], gram[i][i], gram[j][j])
            for i in range(len(self.labels))
            for j in range(i + 1, len(self.labels))
        }

    def as_json(self) -> dict[str, Any]:
        """Return the line of metrics.jsonl."""
        return {
            "step": self.step,
            "total": self.total,
            "terms": self.terms,
            "cosines": self.cosines,
            "grad_norm": self.grad_norm,
            "regularization": self.regularization,
            "learning_rate": self.learning_rate,
            "kept_steps": self.kept_steps,
            "reward_queries": self.reward_queries,
            "seconds": self.seconds,
            "peak_memory": self.peak_memory,
            **({} if self.predicted is None else {"predicted": self.predicted}),
            "idle": self.idle,
            "skipped": self.skipped,
        }


def _cosine(product: float, square_a: float, square_b: float) -> float | None:
    norms = math.sqrt(square_a) * math.sqrt(square_b) if square_a > 0 and square_b > 0 else 0.0
    return max(-1.0, min(1.0, product / norms)) if norms else None
