"""The loop that joins sampler, mix and adapters; its callbacks, checkpoints and resume."""

from alignprop_core.training.callback import Callback, StepRecord
from alignprop_core.training.run import run, train
from alignprop_core.training.trainer import Trainer

__all__ = ["Callback", "StepRecord", "Trainer", "run", "train"]
