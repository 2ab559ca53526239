"""Held-out evaluation: base against tuned at the same seeds, intervals, and sheets to look at."""
