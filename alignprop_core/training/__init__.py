"""The loop that joins sampler, mix and adapters; its callbacks, checkpoints and resume."""

from alignprop_core.training.run import run, train
from alignprop_core.training.trainer import Callback, StepRecord, Trainer

__all__ = ["Callback", "StepRecord", "Trainer", "run", "train"]
