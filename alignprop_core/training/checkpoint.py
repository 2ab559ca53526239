"""Complete training state on disk: adapters, optimizer, step and loss scale, in safetensors and JSON.

A checkpoint takes its name only when it is whole, so a killed run leaves the one before it intact.
All randomness comes from (seed, step, index), so this is all a resumed run needs to be the run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignprop_core.errors import UserError
from alignprop_core.runs import RunFolder

ADAPTER, OPTIMIZER, STATE = "adapter.safetensors", "optimizer.safetensors", "state.json"
EXTRA = "extra.safetensors"


_MAY_DIFFER = {"output", "save", "samples", "evaluation", "guards"}
"""Sections a resumed run may change: they do not touch what is trained."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: adapter tensors, optimizer state, and small numbers such as the step.

    `extra` holds tensors of what not every run has: the adapters' moving average, the best adapters so far.
    """

    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    extra: dict[str, Tensor] = field(default_factory=dict)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Flatten an optimizer's per-parameter state: "0.exp_avg" and so on, parameters numbered in order."""
    states: Mapping[int, Mapping[str, Tensor]] = optimizer.state_dict()["state"]
    return {f"{i}.{key}": value.detach().clone() for i, state in states.items() for key, value in state.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        states.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


def save_checkpoint(folder: RunFolder, checkpoint: Checkpoint) -> Path:
    """Write checkpoints/step-NNNNNN of a run; whole under its name, or not there at all."""
    name = f"checkpoints/step-{int(checkpoint.state['step']):06d}"
    tensors = [*checkpoint.adapter.values(), *checkpoint.optimizer.values(), *checkpoint.extra.values()]
    with folder.staged(name, needs=sum(t.nbytes for t in tensors)) as building:
        save_file({k: v.contiguous().cpu() for k, v in checkpoint.adapter.items()}, building / ADAPTER)
        save_file({k: v.contiguous().cpu() for k, v in checkpoint.optimizer.items()}, building / OPTIMIZER)
        if checkpoint.extra:
            save_file({k: v.contiguous().cpu() for k, v in checkpoint.extra.items()}, building / EXTRA)
        (building / STATE).write_text(json.dumps(checkpoint.state, indent=2) + "\n")
    return folder.path / name


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint folder; raises `UserError` naming the file that is missing or broken."""
    try:
        return Checkpoint(
            adapter=load_file(folder / ADAPTER),
            optimizer=load_file(folder / OPTIMIZER),
            state=json.loads((folder / STATE).read_text()),
            extra=load_file(folder / EXTRA) if (folder / EXTRA).is_file() else {},
        )
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} is no complete checkpoint: {error}. Choose another with --resume DIR.") from error


def find_checkpoint(where: Path) -> Path:
    """Return the newest checkpoint of a run folder, or the folder itself if it is a checkpoint."""
    if (where / STATE).is_file():
        return where
    found = sorted((where / "checkpoints").glob("step-*"))
    if not found:
        raise UserError(
            f"There is no checkpoint in {where}: nothing to resume. Start the run without --resume, or give the folder "
            "of a run or of one checkpoint."
        )
    return found[-1]


def differing_keys(mine: str, stored: str) -> list[str]:
    """Return the dotted keys in which two resolved configs differ and a resumed run may not."""

    def flat(value: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {
            k: v for key, part in value.items() for k, v in flat(part, f"{prefix}.{key}" if prefix else key).items()
        }

    a, b = flat(yaml.safe_load(mine)), flat(yaml.safe_load(stored))
    free = {"training.steps", "training.device", "training.trackers", "training.checkpoint_every"}
    free |= {"training.keep_checkpoints", "backprop.sample_batch_size", "backprop.decode_batch_size"}
    return [
        key
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and key.partition(".")[0] not in _MAY_DIFFER and key not in free
    ]
