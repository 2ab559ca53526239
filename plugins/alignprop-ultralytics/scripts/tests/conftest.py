"""Makes the script and those of alignprop-starter importable."""

from __future__ import annotations

import sys
from pathlib import Path

PLUGIN = Path(__file__).parents[2]
sys.path[:0] = [str(PLUGIN / "scripts"), str(PLUGIN.parent / "alignprop-starter" / "scripts")]
