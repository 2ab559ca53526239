"""The training loop and its callbacks, checkpoints and resume, checks before a run."""
