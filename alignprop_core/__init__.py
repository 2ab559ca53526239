"""alignprop: fine-tune text-to-image diffusion models on differentiable rewards.

The public names below load lazily, so `import alignprop_core` imports no torch.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if "torch" not in sys.modules:
    # OpenMP reads it when torch is imported. By default its threads spin while they wait: on cores that other programs
    # use as well, a step takes four times as long and more.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_PUBLIC = {
    "Callback": "alignprop_core.training.callback",
    "default_registry": "alignprop_core.registry.registry",
    "hookimpl": "alignprop_core.hookspecs",
    "ImageBatch": "alignprop_core.reward",
    "load_config": "alignprop_core.config.load",
    "load_prompts": "alignprop_core.prompts",
    "Registry": "alignprop_core.registry.registry",
    "Reward": "alignprop_core.reward",
    "RewardConfig": "alignprop_core.specs",
    "RewardSpec": "alignprop_core.specs",
    "Run": "alignprop_core.training.result",
    "RunConfig": "alignprop_core.config.sections",
    "Sampler": "alignprop_core.diffusion.sampler",
    "StepStats": "alignprop_core.mix.stats",
    "train": "alignprop_core.training.train",
    "Trainer": "alignprop_core.training.trainer",
}

if TYPE_CHECKING:
    from alignprop_core.config.load import load_config as load_config
    from alignprop_core.config.sections import RunConfig as RunConfig
    from alignprop_core.diffusion.sampler import Sampler as Sampler
    from alignprop_core.hookspecs import hookimpl as hookimpl
    from alignprop_core.mix.stats import StepStats as StepStats
    from alignprop_core.prompts import load_prompts as load_prompts
    from alignprop_core.registry.registry import Registry as Registry
    from alignprop_core.registry.registry import default_registry as default_registry
    from alignprop_core.reward import ImageBatch as ImageBatch
    from alignprop_core.reward import Reward as Reward
    from alignprop_core.specs import RewardConfig as RewardConfig
    from alignprop_core.specs import RewardSpec as RewardSpec
    from alignprop_core.training.callback import Callback as Callback
    from alignprop_core.training.result import Run as Run
    from alignprop_core.training.train import train as train
    from alignprop_core.training.trainer import Trainer as Trainer

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> object:
    """Load a public name from its module the first time it is asked for."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'alignprop_core' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
