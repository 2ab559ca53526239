"""The public API of alignprop_core under a short name: `import alignprop as ap`. Imports no torch."""

from __future__ import annotations

import alignprop_core
from alignprop_core import __version__ as __version__

__all__ = alignprop_core.__all__


def __getattr__(name: str) -> object:
    """Load a public name from alignprop_core the first time it is used."""
    if name in alignprop_core.__all__:
        return getattr(alignprop_core, name)
    raise AttributeError(f"module 'alignprop' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
