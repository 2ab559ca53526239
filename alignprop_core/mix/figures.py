"""What a mix did in a step: sums over samples that add up over chunks, batches and processes, and their meaning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_PER_TERM = ("raw", "raw_square", "weighted", "factor", "held", "size_square", "image_square", "along")
_ALONE = ("images", "moving", "total")


@dataclass(frozen=True)
class Figures:
    """Sums over samples of K terms; plain addition joins chunks, all-reduce of `flat` joins processes.

    Attributes:
        images: (), how many images.
        moving: (), how many (image, term) pairs have a slope and a factor other than zero.
        total: (), the mix's objective.
        raw: (K,), raw scores.
        raw_square: (K,), their squares.
        weighted: (K,), what the terms contribute to the objective.
        factor: (K,), what the counted scores are multiplied with.
        held: (K,), images that a ceiling, floor or target holds.
        size_square: (K,), squared norm of the raw score's gradient where terms are balanced, without limits.
        image_square: (K,), squared norm of the counted score's gradient at the image.
        along: (K,), product of the term's part of the direction with the direction.
        gram: (K, K), products of the counted scores' gradients where terms are balanced.
    """

    images: Tensor
    moving: Tensor
    total: Tensor
    raw: Tensor
    raw_square: Tensor
    weighted: Tensor
    factor: Tensor
    held: Tensor
    size_square: Tensor
    image_square: Tensor
    along: Tensor
    gram: Tensor

    @classmethod
    def zeros(cls, terms: int, device: torch.device) -> Figures:
        """Return the figures of no image."""
        size = len(_ALONE) + terms * len(_PER_TERM) + terms * terms
        # Half and single precision lose what is subtracted later; not every accelerator has double.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return cls.from_flat(torch.zeros(size, device=device, dtype=dtype), terms)

    @classmethod
    def from_flat(cls, flat: Tensor, terms: int) -> Figures:
        """Return what `flat` made of figures of `terms` terms."""
        sizes = [len(_ALONE), len(_PER_TERM) * terms, terms * terms]
        alone, per_term, gram = torch.split(flat, sizes)
        parts = dict(zip(_ALONE, alone.unbind(), strict=True))
        parts |= dict(zip(_PER_TERM, per_term.view(len(_PER_TERM), terms).unbind(), strict=True))
        return cls(gram=gram.view(terms, terms), **parts)

    def flat(self) -> Tensor:
        """Return all sums as one vector."""
        alone = torch.stack([getattr(self, name) for name in _ALONE])
        return torch.cat([alone, *(getattr(self, name) for name in _PER_TERM), self.gram.flatten()])

    def __add__(self, other: Figures) -> Figures:
        mine = self.flat()
        return Figures.from_flat(mine + other.flat().to(mine), len(self.raw))


@dataclass(frozen=True)
class StepFigures:
    """A whole step's figures on the host.

    Attributes:
        images: images scored.
        reward: mean objective.
        moving: whether any image moves under any term.
        terms: label -> figures: `raw`, `weighted`, `factor`, `held`: batch means; `grad_norm`: norm of the counted
            score's gradient at the image; `share`: part of the final direction, null where there is none.
        cosines: "label | label" -> cosine between two terms' gradients; null where one has none.
        score: label -> mean raw score.
        score_square: label -> mean squared raw score.
        gradient_square: label -> squared batch norm of the raw score's gradient where terms are balanced.
    """

    images: int
    reward: float
    moving: bool
    terms: Mapping[str, dict[str, float | None]]
    cosines: Mapping[str, float | None]
    score: Mapping[str, float]
    score_square: Mapping[str, float]
    gradient_square: Mapping[str, float]

    @classmethod
    def read(cls, figures: Figures, labels: Sequence[str]) -> StepFigures:
        """Bring figures to the host, in one transfer, and work out what they mean."""
        figures = Figures.from_flat(figures.flat().cpu(), len(labels))
        images = figures.images.item()
        means = {name: (getattr(figures, name) / images).tolist() for name in ("raw", "weighted", "factor", "held")}
        norms = figures.image_square.sqrt().tolist()
        along, gram = figures.along.tolist(), figures.gram.tolist()
        whole = sum(along)
        # With cancellation to nothing there is no direction of which anything could be a share.
        shares = [value / whole if whole > 0 else None for value in along]
        terms: dict[str, dict[str, float | None]] = {
            label: {
                "raw": means["raw"][i],
                "weighted": means["weighted"][i],
                "factor": means["factor"][i],
                "held": means["held"][i],
                "grad_norm": norms[i],
                "share": shares[i],
            }
            for i, label in enumerate(labels)
        }
        cosines = {
            f"{labels[i]} | {labels[j]}": _cosine(gram[i][j], gram[i][i], gram[j][j])
            for i in range(len(labels))
            for j in range(i + 1, len(labels))
        }
        return cls(
            images=int(images),
            reward=figures.total.item() / images,
            moving=figures.moving.item() != 0,
            terms=terms,
            cosines=cosines,
            score=dict(zip(labels, means["raw"], strict=True)),
            score_square=dict(zip(labels, (figures.raw_square / images).tolist(), strict=True)),
            gradient_square=dict(zip(labels, figures.size_square.tolist(), strict=True)),
        )


def _cosine(product: float, square_a: float, square_b: float) -> float | None:
    both = math.sqrt(square_a) * math.sqrt(square_b) if square_a > 0 and square_b > 0 else 0.0
    return max(-1.0, min(1.0, product / both)) if both else None
