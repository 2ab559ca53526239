"""The training loop and its callbacks, checkpoints and resume, early stopping, checks before a run."""
