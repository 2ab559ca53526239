"""What tests share: fake plugins, toy rewards, tiny models, fresh environments, the counts of the structure."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository."""
