"""From the adapters' gradients to their next values: clipped, and one step of AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from alignprop_core.config.sections import RunConfig
from alignprop_core.training.checkpoint import optimizer_tensors, restore_optimizer


class Updates:
    """The optimizer, its learning rate's schedule and, in float16, the loss scale.

    Args:
        config: the run config.
        parameters: the adapters' parameters.
        device: where they are.
        dtype: what the model computes in; float16 needs a loss scale.

    Attributes:
        optimizer: AdamW.
        schedule: its learning rate's; moves on with every update that changed the adapters.
        scaler: the loss scale, off but in float16.
    """

    def __init__(
        self, config: RunConfig, parameters: Sequence[nn.Parameter], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config, self.parameters, self.device = config, list(parameters), device
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.optimizer.learning_rate,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            eps=config.optimizer.epsilon,
            weight_decay=config.optimizer.weight_decay,
        )
        self.schedule = self._new_schedule(done=0)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    @property
    def rate(self) -> float:
        """The learning rate of the next update."""
        return float(self.schedule.get_last_lr()[0])

    @property
    def scale(self) -> float:
        """What the loss is multiplied with; 1 but in float16."""
        return float(self.scaler.scale(torch.ones((), device=self.device)))

    @property
    def overflow_expected(self) -> bool:
        """Whether a gradient that is not finite may be the loss scale's fault, which then finds a smaller one."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1

    def clear(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def clip(self) -> Tensor:
        """Take the loss scale off the gradients and clip them; returns their norm before that, a scalar tensor."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        limit = self.config.optimizer.max_grad_norm
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, limit, norm)
        return norm

    def apply(self, *, moves: bool) -> bool:
        """Update the adapters; returns whether they changed.

        A step that did nothing, was dropped (`moves` is False), or was skipped for float16 overflow counts neither for
        the schedule nor for the average.
        """
        before = self.scaler.get_scale()
        # Even a zero gradient would move the adapters: by momentum and weight decay.
        if moves:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        if not moves or self.scaler.get_scale() < before:
            return False
        self.schedule.step()
        return True

    def as_json(self) -> dict[str, Any]:
        """Return the numbers for a checkpoint."""
        return {"schedule": self.schedule.last_epoch, "scaler": self.scaler.state_dict()}

    def tensors(self) -> dict[str, Tensor]:
        """Return the optimizer's tensors for a checkpoint."""
        return optimizer_tensors(self.optimizer)

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Put back what `as_json` and `tensors` gave."""
        restore_optimizer(self.optimizer, tensors)
        self.schedule = self._new_schedule(done=int(state["schedule"]))
        self.scaler.load_state_dict(state["scaler"])

    def _new_schedule(self, done: int) -> LRScheduler:
        """Return the learning-rate schedule as it stands after `done` steps."""
        settings = self.config.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] = settings.learning_rate
        schedule: LRScheduler = get_scheduler(
            {"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule),
            self.optimizer,
            num_warmup_steps=settings.warmup_steps,
            num_training_steps=self.config.training.steps,
            last_epoch=done - 1,
        )
        return schedule
