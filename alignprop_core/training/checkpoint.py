"""Complete training state on disk: adapters, optimizer and step, in safetensors and JSON.

A checkpoint gets its name only once it is complete, so a killed run leaves the one before it intact. All randomness
comes from (seed, step, index), so this state is all that a resumed run needs to equal the uninterrupted one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignprop_core.errors import UserError
from alignprop_core.runs.folder import RunFolder
from alignprop_core.training.resume import STATE

ADAPTER, OPTIMIZER, EXTRA = "adapter.safetensors", "optimizer.safetensors", "extra.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """Adapter tensors, optimizer state, and small numbers such as the step.

    `extra` contains tensors that not every run has: the adapters' moving average, the best adapters so far.
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
    """Restore what `optimizer_tensors` returned."""
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        states.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


def save_checkpoint(folder: RunFolder, checkpoint: Checkpoint) -> Path:
    """Write checkpoints/step-NNNNNN of a run, atomically."""
    name = f"checkpoints/step-{int(checkpoint.state['step']):06d}"
    files = {ADAPTER: checkpoint.adapter, OPTIMIZER: checkpoint.optimizer, EXTRA: checkpoint.extra}
    with folder.staged(name, needs=sum(t.nbytes for part in files.values() for t in part.values())) as building:
        for file, tensors in files.items():
            save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, building / file)
        (building / STATE).write_text(json.dumps(checkpoint.state, indent=2) + "\n")
    return folder.path / name


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint folder; raises `UserError` naming the file that is missing or broken."""
    try:
        state = json.loads((folder / STATE).read_text())
        return Checkpoint(
            adapter=load_file(folder / ADAPTER),
            optimizer=load_file(folder / OPTIMIZER),
            state=_upgraded(state) if "guarding" in state else state,
            extra=load_file(folder / EXTRA) if (folder / EXTRA).is_file() else {},  # not in checkpoints before 0.1
        )
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} is not a complete checkpoint: {error}. Choose another with --resume DIR.") from error


def _upgraded(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state with today's names; before 0.1 it was written with others."""
    guarding = state.pop("guarding")
    steps, stopping = guarding["steps"], guarding["heldout"]
    if (basis := stopping.pop("subject", None)) is not None:
        basis = {"images": basis["pictures"], "diversity": basis["diversity"], "monitored": {}}
    return state | {
        "step_check": {**steps, "skipped": steps["dropped"]},
        "early_stopping": {
            **{key: value for key, value in stopping.items() if key != "spreads"},
            "stds": stopping["spreads"],
            "basis": basis,
        },
        "ema_updates": guarding["averaged"],
    }
