"""Opening a run's folder: config.yaml, and environment.json with versions, device and times."""

from __future__ import annotations

import platform
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from alignprop_core._files import read_table
from alignprop_core.config.load import resolved_yaml
from alignprop_core.config.sections import RunConfig
from alignprop_core.registry.code_checksum import code_checksum
from alignprop_core.registry.registry import Registry
from alignprop_core.runs.fingerprints import Files
from alignprop_core.runs.folder import RunFolder

_LIBRARIES = ("alignprop-core", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")


def open_folder(
    config: RunConfig,
    registry: Registry,
    *,
    device: torch.device,
    checkpoint: Path | None = None,
    step: int = 0,
    overwrite: bool = False,
    files: Files | None = None,
) -> RunFolder:
    """Create a run's folder, or open it to resume, and write config.yaml and environment.json.

    Args:
        config: the run config; its `output` is the folder.
        registry: where its names were looked up.
        device: the training device.
        checkpoint: the checkpoint to resume from, if any.
        step: steps done; when resuming, later lines of the metrics are removed.
        overwrite: whether an earlier run in the folder may be replaced.
        files: the checksums of the files that the run depends on.
    """
    times = _times(checkpoint)
    if checkpoint is not None and (Path(config.output) / "config.yaml").is_file():
        folder = RunFolder.open(config.output)
        folder.truncate_metrics(step)
    else:
        folder = RunFolder.create(config.output, overwrite=overwrite)
    folder.write_text("config.yaml", resolved_yaml(config))
    folder.write_json("environment.json", {**times, **environment(config, registry, device), "files": files or {}})
    return folder


def _times(checkpoint: Path | None) -> dict[str, Any]:
    """Return `started` and `resumed`, in ISO 8601 with the offset to UTC; a resumed run keeps its start.

    The start is null if it is unknown: the checkpoint is in no run folder, or an older version started the run.
    """
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    if checkpoint is None:
        return {"started": now, "resumed": []}
    known = read_table(checkpoint.parent.parent / "environment.json")
    resumed = known.get("resumed")
    return {"started": known.get("started"), "resumed": [*(resumed if isinstance(resumed, list) else []), now]}


def environment(config: RunConfig, registry: Registry, device: torch.device) -> dict[str, Any]:
    """Return versions of the core, its libraries and the plugins used, the device, licenses, and where code is from."""
    given, terms = registry.given, (*config.rewards, *config.evaluation.rewards)
    loaded = [(term, *term.loader) for term in terms if term.loader]
    isolated = {term.label: registry.reward_loader(key, value).origin(term.name) for term, key, value in loaded}
    names = [term.name for term in terms if not term.loader]
    local = {name: found.origin for name in names if (found := registry.local(name)) is not None}
    offers = [registry.reward(name) for name in names if name not in local]
    model = registry.find_model(config.model.base)
    used = {offer.distribution for offer in offers} | ({model.distribution} if model else set())
    used |= {registry.loader(key).distribution for _, key, _ in loaded}
    specs = [offer.spec for offer in offers]
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {name: _version(name) for name in _LIBRARIES},
        "plugins": {name: _version(name) for name in sorted(used)},
        "installed": _installed(),
        "device": {
            "kind": "cuda" if cuda else "cpu",
            "names": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if cuda else [],
            "cuda": torch.version.cuda if cuda else None,
            "threads": torch.get_num_threads(),
        },
        "licenses": {
            spec.name: {"reward": spec.license, "weights": {file.file: file.license for file in spec.weights}}
            for spec in specs
        },
        "local_rewards": local,
        "class_sources": {name: code_checksum(given[name].code) for name in local if name in given},
        "isolated_rewards": isolated,
        "training_device": str(device),
    }


def _installed() -> dict[str, str]:
    """Return the versions of all installed distributions, from the names of their folders, which is quick."""
    folders = sorted(path.stem for place in reversed(sys.path) for path in Path(place).glob("*.dist-info"))
    return {name: version for name, _, version in (folder.partition("-") for folder in folders)}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
