"""Running out of memory: which settings reduce it most, and by how much."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch

from alignprop_core.errors import RunError

if TYPE_CHECKING:
    from alignprop_core.training.trainer import Trainer


@contextmanager
def explained(trainer: Trainer) -> Iterator[None]:
    """Turn an out-of-memory error inside the block into one that names the settings that help.

    Raises:
        RunError: the device ran out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason, step = str(error).partition(". GPU")[0].strip(), trainer.step_number
        traceback.clear_frames(error.__traceback__)  # they keep the failed step's tensors alive
    else:
        return
    batch = -(-trainer.config.training.batch_size // trainer.processes.num_processes)
    settings = ["backprop.checkpoint_blocks=true", "backprop.checkpoint_decoder=true"]
    if trainer.device.type == "cuda":
        trainer.sampler.engine.release()
        with suppress(torch.OutOfMemoryError):  # not even one sample fits
            savings = trainer.sampler.memory.savings(batch)[:3]
            settings = [f"{setting} (about {_size(size)} less)" for setting, size in savings]
    raise RunError(
        f"Out of memory in step {step + 1}, with {batch} samples per batch and {trainer.gradient.kept_steps(step)} "
        "denoising steps that keep their gradient. Nothing saved is lost. These settings change memory and time, "
        f"not the result: {'; '.join([*settings, 'mix.offload=true (the weights of the rewards)'])}. Otherwise use "
        f"smaller images. ({reason})"
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
