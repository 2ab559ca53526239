"""Optimizer step: clip, AdamW, learning-rate schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from alignprop_core.config.sections import RunConfig
from alignprop_core.training.checkpoint import restore_optimizer


class Optimizer:
    """AdamW with its learning-rate schedule.

    Args:
        config: the run config.
        parameters: the adapters' parameters.

    Attributes:
        adamw: the optimizer itself.
        schedule: its learning-rate schedule; advances with each step that changed the adapters.
    """

    def __init__(self, config: RunConfig, parameters: Sequence[nn.Parameter]) -> None:
        self.config, self.parameters = config, list(parameters)
        self.adamw = torch.optim.AdamW(
            self.parameters,
            lr=config.optimizer.learning_rate,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            eps=config.optimizer.epsilon,
            weight_decay=config.optimizer.weight_decay,
        )
        self.schedule = self._new_schedule(done=0)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def zero_grad(self) -> None:
        """Clear the gradients."""
        self.adamw.zero_grad(set_to_none=True)

    def clip(self) -> Tensor:
        """Clip the gradients to `optimizer.max_grad_norm`; returns their norm before clipping, ()."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        limit = self.config.optimizer.max_grad_norm
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, limit, norm)
        return norm

    def step(self, *, skip: bool = False) -> bool:
        """Update the adapters; returns whether they changed. A skipped step does not advance the schedule."""
        # Even a zero gradient would change the adapters, by momentum and weight decay: hence no step at all.
        if skip:
            return False
        self.adamw.step()
        self.schedule.step()
        return True

    def load(self, done: int, tensors: Mapping[str, Tensor]) -> None:
        """Restore the schedule after `done` steps, and what `optimizer_tensors` returned."""
        restore_optimizer(self.adamw, tensors)
        self.schedule = self._new_schedule(done)

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
