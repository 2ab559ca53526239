"""A training run of two steps for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignprop_core.registry.registry import Registry
from alignprop_core.testing.pipelines import tiny_pipeline


def train_two_steps(
    reward: str,
    folder: Path,
    options: Mapping[str, Any] | None = None,
    *,
    prompts: tuple[str, ...] = ("a cat", "two dogs"),
    registry: Registry | None = None,
) -> Path:
    """Fine-tune a tiny pipeline (random weights, 32x32) on a reward for two steps, and write a complete run folder.

    Args:
        reward: the reward's name.
        folder: an empty folder for the model, the prompts and the run.
        options: the reward's options.
        prompts: the training prompts.
        registry: where the reward is looked up; the installed plugins if None.

    Returns:
        The run folder: metrics.jsonl has two lines, lora/ the adapters.
    """
    from alignprop_core.training.train import train

    tiny_pipeline("stable_diffusion").save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    config = {
        "model": {"base": str(folder / "model")},
        "prompts": {"train": str(folder / "prompts.txt")},
        "sampling": {"steps": 2, "guidance_scale": 2.0},
        "lora": {"rank": 2},
        "rewards": [{"name": reward, "options": dict(options or {})}],
        "training": {"steps": 2, "batch_size": 2, "device": "cpu"},
        "output": str(folder / "run"),
    }
    return train(config, registry=registry).folder
