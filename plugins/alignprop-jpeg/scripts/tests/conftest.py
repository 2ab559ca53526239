"""Makes the scripts and the helper modules of the tests importable."""

from __future__ import annotations

import sys
from pathlib import Path

PLUGIN = Path(__file__).parents[2]
sys.path[:0] = [str(PLUGIN / "scripts"), str(PLUGIN / "tests")]
