"""Scoring in the worker: reads a batch from the shared file, writes scores and gradients back into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from alignprop_core.registry.registry import default_registry
from alignprop_core.reward import ImageBatch, check_scores
from alignprop_isolation.messages import error_data
from alignprop_isolation.shared_images import SharedImages


class Server:
    """A loaded reward that scores batches.

    Args:
        name: the reward, in this environment.
        options: its options.
        device: where it computes; "auto" is the run's device if this environment supports it, else the CPU.
        file: the shared file.
    """

    def __init__(self, name: str, options: dict[str, Any], device: str, file: Path) -> None:
        registry = default_registry()
        self.name = name
        self.differentiable = registry.reward(name).spec.differentiable
        self.reward = registry.load_reward(name, options)
        self.device = device
        self.file = file
        self.shared = SharedImages(file)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Score a batch, or check a prompt; an error is returned as data."""
        try:
            if "prompt" in request:
                self.reward.check_prompt(request["prompt"], request["metadata"])
                return {}
            return self._score(request)
        except Exception as error:
            return {"error": error_data(error)}

    def _score(self, request: dict[str, Any]) -> dict[str, Any]:
        shape = tuple(request["shape"])
        dtype: torch.dtype = getattr(torch, request["dtype"])
        device = self._device(request["device"])
        self.reward.to(device)
        # A copy, so that a reward that writes into its input does not write into the run's file.
        images = self.shared.images(shape, dtype).clone().to(device)
        gradient = bool(request["gradient"])
        batch = ImageBatch(
            images=images.requires_grad_(gradient), prompts=request["prompts"], metadata=request["metadata"]
        )
        with torch.set_grad_enabled(gradient):
            scores = check_scores(self.name, self.reward(batch), len(batch), differentiable=gradient)
            if gradient:
                # A score depends on its own image only, so the gradient of the sum is the gradient of each score.
                (found,) = torch.autograd.grad(scores.sum(), images)
                self.shared.gradients(shape, dtype).copy_(found)
        self.shared.scores(shape, dtype).copy_(scores.detach())
        return {"dtype": str(scores.dtype).removeprefix("torch.")}

    def _device(self, run: str) -> torch.device:
        wanted = run if self.device == "auto" else self.device
        lacks_cuda = wanted.startswith("cuda") and not torch.cuda.is_available()
        lacks_mps = wanted == "mps" and not torch.backends.mps.is_available()
        if self.device == "auto" and (lacks_cuda or lacks_mps):
            return torch.device("cpu")
        return torch.device(wanted)
