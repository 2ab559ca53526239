"""Held-out evaluation: base and tuned model at the same seeds, with intervals, and image sheets."""
