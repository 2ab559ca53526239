"""An isolated reward as the run uses it: a `Reward` like any other."""

from __future__ import annotations

import logging
import os
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict
from torch import Tensor

from alignprop_core.errors import RewardError
from alignprop_core.reward import ImageBatch, Reward
from alignprop_core.specs import RewardConfig
from alignprop_isolation.config import IsolationConfig
from alignprop_isolation.process import Worker, WorkerExited
from alignprop_isolation.shared_images import SharedImages, shared_folder

_log = logging.getLogger(__name__)


class IsolatedOptions(RewardConfig):
    """Options that the other environment has checked; their class exists only there."""

    model_config = ConfigDict(extra="allow", frozen=True)


class IsolatedReward(Reward):
    """A reward that a worker process in another environment computes.

    Building this object starts the worker and loads the reward there. Each batch is one exchange: images to the worker,
    scores and the gradient of each image back. The backward pass multiplies that gradient and needs no exchange. Only
    first derivatives are available. A worker that exits is restarted once per batch.

    Args:
        name: the reward, in that environment.
        options: its options, checked there.
        isolation: the environment, the device and the limits of the worker.

    Raises:
        RewardError: the reward could not be loaded there (or its own error, such as `WeightsError`).
    """

    def __init__(self, name: str, options: dict[str, Any], isolation: IsolationConfig) -> None:
        super().__init__(IsolatedOptions(**options))
        self.name = name
        self.options = options
        self.isolation = isolation
        handle, path = tempfile.mkstemp(prefix="alignprop-", suffix=".images", dir=shared_folder())
        os.close(handle)
        self._file = Path(path)
        weakref.finalize(self, _remove, self._file)
        self._shared = SharedImages(self._file)
        self._worker: Worker | None = None
        self._start()

    @property
    def worker(self) -> int | None:
        """Process id of the worker; None if no worker is running."""
        return self._worker.pid if self._worker is not None and self._worker.alive else None

    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) scores as the reward computes them there, on the device of the images."""
        if torch.is_grad_enabled() and batch.images.requires_grad:
            scores: Tensor = _Exchange.apply(batch.images, batch, self)
            return scores
        return self.exchange(batch, gradient=False)[0]

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        """Raise what the reward raises there if it cannot use a prompt."""
        self._ask({"prompt": prompt, "metadata": dict(metadata)}, "check a prompt")

    def exchange(self, batch: ImageBatch, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Return (B,) scores and, with `gradient`, (B, 3, H, W) gradients of each score by its own image."""
        images = batch.images.detach()
        shape, dtype = tuple(images.shape), images.dtype
        request = {
            "shape": shape,
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(images.device),
            "prompts": list(batch.prompts),
            "metadata": [dict(each) for each in batch.metadata],
            "gradient": gradient,
        }
        self._shared.reserve(shape, dtype)
        self._shared.images(shape, dtype).copy_(images)
        answer = self._ask(request, "score a batch")
        # The views are valid until the next batch, so the results are copied.
        scores = self._shared.scores(shape, dtype).to(images.device, getattr(torch, answer["dtype"]), copy=True)
        found = self._shared.gradients(shape, dtype).to(images.device, copy=True) if gradient else None
        return scores, found

    def close(self) -> None:
        """End the worker; the next batch starts another."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _start(self) -> Worker:
        worker = Worker(self.isolation.python, self.isolation.memory_limit)
        request = {
            "name": self.name,
            "options": self.options,
            "device": self.isolation.device,
            "file": str(self._file),
        }
        worker.ask(request, timeout=self.isolation.start_timeout, doing=f"load {self.name}")
        self._worker = worker
        return worker

    def _ask(self, request: dict[str, Any], doing: str) -> dict[str, Any]:
        """Send a request, and once more to a new worker if this one exits: it may have been killed for its memory."""
        worker = self._worker if self._worker is not None and self._worker.alive else None
        for again in (True, False):
            try:
                return (worker or self._start()).ask(request, timeout=self.isolation.timeout, doing=doing)
            except WorkerExited as error:
                self._worker = worker = None
                if not again:
                    raise RewardError(f"{error}\nThis was the second time in a row.") from error
                _log.warning("%s: %s\nThe worker is restarted.", self.name, error)
        raise AssertionError("unreachable")


class _Exchange(torch.autograd.Function):
    """Scores, and the gradient that the worker returned with them."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, batch: ImageBatch, reward: IsolatedReward) -> Tensor:
        scores, gradient = reward.exchange(batch, gradient=True)
        ctx.save_for_backward(gradient)
        return scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        # (B, 3, H, W) times the incoming (B,) gradient of the scores.
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient)[:, None, None, None], None, None


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
