"""The chain of denoising steps: from noise to final latents, with a graph through the kept steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alignprop_core.diffusion.calls import NetworkCalls
from alignprop_core.diffusion.families.base import Conditioning
from alignprop_core.diffusion.noise import Noise
from alignprop_core.diffusion.regularization import squared_difference
from alignprop_core.diffusion.schedulers import Scheduler
from alignprop_core.diffusion.truncation import Truncation
from alignprop_core.lora import adapters


class Chain:
    """The denoising chain of one batch.

    Args:
        calls: the networks.
        scheduler: the scheduler's steps as pure functions.
        conditioning: the encoded prompts of the B samples.
        truncation: the steps that keep their gradient; None for a chain without a graph.
        regularization: weight of the squared difference to the base model's predictions; 0 computes none.
        checkpointing: whether kept steps are recomputed in the backward pass instead of stored.
    """

    def __init__(
        self,
        calls: NetworkCalls,
        scheduler: Scheduler,
        conditioning: Conditioning,
        truncation: Truncation | None,
        *,
        regularization: float = 0.0,
        checkpointing: bool = False,
    ) -> None:
        self._calls, self._scheduler, self._truncation = calls, scheduler, truncation
        denoiser = calls.family.denoiser
        network = partial(calls.run, calls.family.predict, conditioning=conditioning)  # (latents, timestep) -> (B, ...)
        with torch.set_grad_enabled(truncation is not None):
            self._predict = partial(network, forwards=calls.forwards_of(denoiser))
        # The networks draw no random numbers, so there is no generator state to restore for the second run.
        recomputing = partial(checkpoint, self._predict, use_reentrant=False, preserve_rng_state=False)
        self._predict_kept: Callable[..., Tensor] = recomputing if checkpointing else self._predict
        self._regularization = regularization if truncation is not None else 0.0
        if self._regularization:
            with torch.no_grad(), adapters.disabled(denoiser):
                self._predict_base = partial(network, forwards=calls.forwards_of(denoiser))

    def run(self, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        """Denoise; returns the final latents, (B, C, h, w) or (B * (1 + n), C, h, w) with n LV samples, and aux losses.

        Args:
            noise: the batch's randomness.
        """
        calls, scheduler, truncation = self._calls, self._scheduler, self._truncation
        latents = noise.initial.to(calls.device, calls.dtype)
        step_noise = None if noise.steps is None else noise.steps.to(calls.device, calls.dtype)
        state = scheduler.initial_state
        penalties: list[Tensor] = []
        for i, timestep in enumerate(scheduler.timesteps):
            # No graph before the first kept step; from there on every step carries the gradient of those before it.
            in_graph = truncation is not None and i >= truncation.first
            keep = truncation is not None and i in truncation.kept
            seen = latents.detach() if truncation is not None and truncation.detach_input else latents
            # A dropped step's prediction is a constant; inside the graph only the linear path runs through it.
            with torch.set_grad_enabled(keep):
                prediction = (self._predict_kept if keep else self._predict)(seen, timestep)
                if keep and self._regularization:
                    penalties.append(self._penalty(seen, prediction, timestep))
            with torch.set_grad_enabled(in_graph):
                if truncation is not None and i == truncation.stop_at:
                    latents = scheduler.clean(latents, prediction, i)
                    break
                added = None if step_noise is None else step_noise[i]
                latents, state = scheduler.step(latents, prediction, i, state, added)
        if truncation is not None and noise.lv is not None:
            latents = self._with_lv_samples(latents, noise.lv.to(calls.device, calls.dtype))
        return latents, {"regularization": self._regularization * torch.stack(penalties).mean()} if penalties else {}

    def _penalty(self, latents: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
        off = partial(adapters.disabled, self._calls.family.denoiser)
        return squared_difference(latents, prediction, lambda inputs: self._predict_base(inputs, timestep), off)

    def _with_lv_samples(self, latents: Tensor, noise: Tensor) -> Tensor:
        """Append low-variance samples (DRaFT-LV, Clark et al. 2024, algorithm 1): renoise one step, denoise again.

        Args:
            latents: (B, C, h, w), the final latents.
            noise: (n, B, C, h, w).

        Returns:
            (B * (1 + n), C, h, w).
        """
        last, scheduler = self._scheduler.steps - 1, self._scheduler
        rows = [latents]
        for fresh in noise:
            # Each sample keeps the gradient of its one step alone, as with last_k of 1.
            renoised = scheduler.renoise(latents.detach(), last, fresh)
            prediction = self._predict_kept(renoised, scheduler.timesteps[last])
            rows.append(scheduler.step(renoised, prediction, last, scheduler.initial_state, None)[0])
        return torch.cat(rows)
