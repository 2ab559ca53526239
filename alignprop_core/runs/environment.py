"""The environment of a run: versions, device, licenses. Imports torch only in `environment`."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from alignprop_core.specs import RewardSpec

_LIBRARIES = ("alignprop-core", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")


def environment(plugins: Iterable[str] = (), rewards: Iterable[RewardSpec] = ()) -> dict[str, Any]:
    """Return versions of the core, its libraries and the `plugins` used (distribution names), the device, and the
    licenses of the `rewards` and their weights. Imports torch.
    """
    import torch

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {name: _version(name) for name in _LIBRARIES},
        "plugins": {name: _version(name) for name in sorted(set(plugins))},
        "device": {
            "kind": "cuda" if cuda else "cpu",
            "names": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if cuda else [],
            "cuda": torch.version.cuda if cuda else None,
            "threads": torch.get_num_threads(),
        },
        "licenses": {
            spec.name: {"reward": spec.license, "weights": {file.file: file.license for file in spec.weights}}
            for spec in rewards
        },
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
