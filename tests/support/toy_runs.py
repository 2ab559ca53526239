"""Short runs of a tiny model: the config they start from, and reading what they wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from alignprop_core.config.load import load_config
from alignprop_core.config.sections import RunConfig
from alignprop_core.mix.stats import StepStats
from alignprop_core.registry.registry import Registry
from alignprop_core.training.callback import Callback
from alignprop_core.training.trainer import Trainer

PROMPTS = ("a fox", "two owls", "three red boats", "a hill")


def toy_data(model: Path, folder: Path, **sections: object) -> dict[str, Any]:
    """Return a run config's data; keyword arguments replace whole sections. Its prompts are written to the folder."""
    prompts = folder / "prompts.txt"
    prompts.write_text("\n\n".join(PROMPTS) + "\n")
    data = {
        "model": {"base": str(model)},
        "prompts": {"train": str(prompts), "heldout": str(prompts)},
        "sampling": {"steps": 3, "guidance_scale": 2.0},
        "rewards": [{"name": "redness"}],
        "lora": {"rank": 4},
        "optimizer": {"learning_rate": 1e-2},
        "training": {"steps": 6, "batch_size": 4, "device": "cpu"},
        "previews": {"prompts": []},
        "save": {"every": None},
        "evaluation": {"at_end": False, "images_per_prompt": 2},
        "output": str(folder / "run"),
    }
    return data | sections


def changed(data: Mapping[str, Any], overrides: Mapping[str, object], registry: Registry) -> RunConfig:
    """Check data with overrides given as keyword arguments: dots are written as double underscores."""
    changes = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in overrides.items()]
    return load_config(data, registry=registry, overrides=changes)


def adapters(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a run's LoRA."""
    tensors: dict[str, Tensor] = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    return tensors


def metrics(folder: Path, key: str = "step") -> list[dict[str, Any]]:
    """Return the lines of a run's metrics that have a key."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if key in row]


class Interrupt(Callback):
    """Interrupts a run after a step, as Ctrl-C would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Trainer, stats: StepStats) -> None:
        """Interrupt when it is time."""
        if stats.step == self.step:
            raise KeyboardInterrupt
