"""A term of a mix: a reward, its weight over the steps, and the limits its score is clipped to."""

from __future__ import annotations

import sysconfig
import traceback
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from alignprop_core.errors import RewardError, UserError
from alignprop_core.mix.offload import Offload
from alignprop_core.reward import ImageBatch, Reward, check_scores

_LIBRARIES = Path(torch.__file__).parents[1]
_NOT_THE_REWARDS = (Path(__file__).parents[1], _LIBRARIES / "torch", _LIBRARIES / "torchvision")
_STANDARD, _INSTALLED = Path(sysconfig.get_path("stdlib")), ("site-packages", "dist-packages")
"""Folders of code that the author of a reward does not maintain."""


def raised_at(error: BaseException) -> str:
    """Return ` (my_rewards.py:12, in score)`, the innermost frame of an error in a reward's own code; "" without one.

    Frames of this package, torch, torchvision and the standard library are left out.
    """
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        standard = file.is_relative_to(_STANDARD) and not set(_INSTALLED) & set(file.parts)
        if not (standard or frame.filename.startswith("<frozen") or any(map(file.is_relative_to, _NOT_THE_REWARDS))):
            return f" ({file}:{frame.lineno}, in {frame.name})"
    return ""


def labelled(error: UserError | RewardError, label: str) -> Exception:
    """Return the error with the reward's label before its message; notes are kept."""
    named = type(error)(f'Reward "{label}": {error}')
    for note in getattr(error, "__notes__", ()):
        named.add_note(note)
    return named


@dataclass(frozen=True)
class Term:
    """One reward of a mix.

    Attributes:
        label: its name in logs, unique in the mix.
        reward: the frozen module.
        weight: factor of its score in the total, or {steps done: factor}, linear between the points; a negative
            weight minimizes the score.
        ceiling: scores are clipped to at most this; at or above it a sample's gradient is zero.
        floor: scores are clipped to at least this; at or below it a sample's gradient is zero.
        target: -|score - target| replaces the score; excludes ceiling and floor.
        differentiable: whether scores must carry a gradient.
        offload: keeps the reward's weights on the CPU between uses; None leaves them where they are.
        files: the files it was loaded from.
    """

    label: str
    reward: Reward
    weight: float | Mapping[int, float] = 1.0
    ceiling: float | None = None
    floor: float | None = None
    target: float | None = None
    differentiable: bool = True
    offload: Offload | None = None
    files: frozenset[Path] = frozenset()

    def __post_init__(self) -> None:
        if self.target is not None and (self.ceiling is not None or self.floor is not None):
            raise ValueError(f'term "{self.label}": a target excludes ceiling and floor')

    def weight_at(self, step: int) -> float:
        """Return the weight after `step` optimizer steps: linear between a schedule's points, constant outside."""
        if not isinstance(self.weight, Mapping):
            return float(self.weight)
        points = sorted(self.weight.items())
        after = bisect_right(points, step, key=lambda point: point[0])
        if after == 0:
            return float(points[0][1])
        if after == len(points):
            return float(points[-1][1])
        (start, low), (end, high) = points[after - 1], points[after]
        return low + (high - low) * (step - start) / (end - start)

    @property
    def placed(self) -> AbstractContextManager[object]:
        """A context in which an offloaded reward is on its device; run backward passes of its scores inside."""
        return nullcontext() if self.offload is None else self.offload

    def score(self, batch: ImageBatch) -> Tensor:
        """Return checked raw scores, (B,), float32 or float64; raises `RewardError` with the term's label."""
        with self.placed, self.named("raised"):
            scores = self.reward(batch)
        due = self.differentiable and torch.is_grad_enabled() and batch.images.requires_grad
        return check_scores(self.label, scores, len(batch), differentiable=due)

    @contextmanager
    def named(self, what: str) -> Iterator[None]:
        """Re-raise the reward's errors with the term's label; errors of other types become a `RewardError`."""
        try:
            yield
        except (UserError, RewardError) as error:  # a message of the reward itself, such as a prompt without a number
            raise labelled(error, self.label) from error
        except torch.OutOfMemoryError as error:
            raise RewardError(
                f'Reward "{self.label}" ran out of memory. Score fewer images at a time (mix.reward_batch_size), or '
                "keep the rewards' weights on the CPU between uses (mix.offload: true)."
            ) from error
        except (Exception, SystemExit) as error:
            words = f"{type(error).__name__}: {error}{raised_at(error)}"
            raise RewardError(f'Reward "{self.label}" {what} {words}') from error

    def clipped(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the clipped scores, and their derivative by the raw scores.

        Args:
            scores: (B,) raw scores.

        Returns:
            (B,): -|score - target| with a target, else the score clipped to [floor, ceiling]; and (B,): its derivative
            by the score: 1, 0 (saturated) or, above a target, -1.
        """
        if self.target is not None:
            return -(scores - self.target).abs(), torch.sign(self.target - scores)
        clipped = scores
        # Where the score is strictly inside the limits; elsewhere the derivative is 0.
        free = torch.ones_like(scores, dtype=torch.bool)
        if self.ceiling is not None:
            clipped, free = clipped.clamp(max=self.ceiling), free & (scores < self.ceiling)
        if self.floor is not None:
            clipped, free = clipped.clamp(min=self.floor), free & (scores > self.floor)
        # NaN stays NaN: clipping must not hide a broken score.
        return torch.where(scores.isnan(), scores, clipped), free.to(scores)
