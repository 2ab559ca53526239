"""Optimizer step: unscale, clip, AdamW, learning-rate schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from alignprop_core.config.sections import RunConfig
from alignprop_core.training.checkpoint import restore_optimizer


class Optimizer:
    """AdamW with its learning-rate schedule and, in float16, the loss scale.

    Args:
        config: the run config.
        parameters: the adapters' parameters.
        device: where they are.
        dtype: what the model computes in; float16 needs a loss scale.

    Attributes:
        adamw: the optimizer itself.
        schedule: its learning-rate schedule; advances with each step that changed the adapters.
        scaler: the loss scale; disabled except in float16.
    """

    def __init__(
        self, config: RunConfig, parameters: Sequence[nn.Parameter], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config, self.parameters, self.device = config, list(parameters), device
        self.adamw = torch.optim.AdamW(
            self.parameters,
            lr=config.optimizer.learning_rate,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            eps=config.optimizer.epsilon,
            weight_decay=config.optimizer.weight_decay,
        )
        self.schedule = self._new_schedule(done=0)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    @property
    def scale(self) -> float:
        """Factor on the loss; 1 except in float16."""
        # `scale` also creates the scaler's state, which `unscale_` needs; reading it waits for the device.
        return float(self.scaler.scale(torch.ones((), device=self.device))) if self.scaler.is_enabled() else 1.0

    @property
    def overflow_expected(self) -> bool:
        """Whether a gradient that is not finite may be due to the loss scale, which then shrinks."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1

    def zero_grad(self) -> None:
        """Clear the gradients."""
        self.adamw.zero_grad(set_to_none=True)

    def clip(self) -> Tensor:
        """Unscale the gradients and clip them to `optimizer.max_grad_norm`; returns their norm before clipping, ()."""
        self.scaler.unscale_(self.adamw)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        limit = self.config.optimizer.max_grad_norm
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, limit, norm)
        return norm

    def step(self, *, skip: bool = False) -> bool:
        """Update the adapters; returns whether they changed.

        A step that is skipped here, or by the loss scale for float16 overflow, does not advance the schedule.
        """
        before = self.scaler.get_scale()
        # Even a zero gradient would change the adapters, by momentum and weight decay: hence no step at all.
        if not skip:
            self.scaler.step(self.adamw)
        self.scaler.update()
        if skip or self.scaler.get_scale() < before:
            return False
        self.schedule.step()
        return True

    def as_json(self) -> dict[str, Any]:
        """Return the numbers for a checkpoint."""
        return {"schedule": self.schedule.last_epoch, "scaler": self.scaler.state_dict()}

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restore what `as_json` and `optimizer_tensors` returned."""
        restore_optimizer(self.adamw, tensors)
        self.schedule = self._new_schedule(done=int(state["schedule"]))
        self.scaler.load_state_dict(state["scaler"])

    def _new_schedule(self, done: int) -> LRScheduler:
        """Return the learning-rate schedule after `done` steps."""
        settings = self.config.optimizer
        for group in self.adamw.param_groups:
            group["lr"] = group["initial_lr"] = settings.learning_rate
        schedule: LRScheduler = get_scheduler(
            {"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule),
            self.adamw,
            num_warmup_steps=settings.warmup_steps,
            num_training_steps=self.config.training.steps,
            last_epoch=done - 1,
        )
        return schedule
