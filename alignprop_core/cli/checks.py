"""The checks of `alignprop doctor`. Only the check of accelerators imports torch."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from alignprop_core import __version__
from alignprop_core.registry.discovery import ALLOW_VARIABLE, BLOCK_VARIABLE, CORE, names_in
from alignprop_core.registry.registry import Registry

Status = Literal["ok", "warning", "error"]

LOW_DISK_BYTES = 5e9
"""A Stable Diffusion 1.5 download is about 4 GB, and a new checkpoint is written before the last one is deleted."""


@dataclass(frozen=True)
class Finding:
    """Result of one check, with advice where something is wrong."""

    what: str
    status: Status
    found: str
    advice: str = ""


def check_all(registry: Registry, *, quick: bool) -> list[Finding]:
    """Run all checks.

    Args:
        registry: the plugins to report.
        quick: skip the checks that import torch.
    """
    found = [*_machine(), *_packages()]
    if not quick:
        found += _accelerators()
    return [*found, *_plugins(registry), *_disk(), *_hub(), *_threads()]


def _machine() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} ({sys.executable})")
    yield Finding("system", "ok", f"{platform.system()} {platform.release()}, {platform.machine()}")
    yield Finding(CORE, "ok", __version__)


def _packages() -> Iterator[Finding]:
    """Compare installed versions with the requirements in the core's metadata, without importing the packages."""
    try:
        lines = requires(CORE) or []
    except PackageNotFoundError:
        yield Finding(CORE, "warning", "not installed as a package", "Install it: pip install -e . in its checkout.")
        return
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        fix = f'pip install -U "{requirement.name}{requirement.specifier}"'
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            yield Finding(requirement.name, "error", "not installed", fix)
            continue
        if requirement.specifier.contains(installed, prereleases=True):
            yield Finding(requirement.name, "ok", installed)
        else:
            yield Finding(requirement.name, "error", f"{installed}, required is {requirement.specifier}", fix)


def _accelerators() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:
        advice = "Reinstall torch for this machine: pytorch.org."
        yield Finding("torch", "error", f"cannot be imported: {error}", advice)
        return
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(i)
            free, total = torch.cuda.mem_get_info(i)
            bf16 = "bf16" if facts.major >= 8 else "no bf16: use fp16"
            memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
            yield Finding(f"cuda:{i}", "ok", f"{facts.name}, {memory}, {bf16}")
    elif torch.backends.mps.is_available():
        advice = "If an operation is not implemented for MPS, set PYTORCH_ENABLE_MPS_FALLBACK=1."
        yield Finding("mps", "ok", "Apple GPU", advice)
    elif shutil.which("nvidia-smi"):
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        found = f"an NVIDIA driver is installed, but torch {torch.__version__} ({build}) finds no device"
        advice = "Install a CUDA build of torch (pytorch.org); check CUDA_VISIBLE_DEVICES and the driver's version."
        yield Finding("accelerator", "warning", found, advice)
    else:
        advice = "Small models train on a CPU; Stable Diffusion needs a GPU."
        yield Finding("accelerator", "ok", "none: runs use the CPU", advice)


def _plugins(registry: Registry) -> Iterator[Finding]:
    for record in registry.plugins:
        offers = sum(len(specs) for specs in record.offers.values())
        what = f"plugin {record.distribution}"
        if record.status == "loaded":
            found = f"{record.version}, {offers} offer{'s' if offers != 1 else ''}"
            yield Finding(what, "warning" if record.warnings else "ok", found, "; ".join(record.warnings))
        else:
            found = f"{record.version}, {record.status}: {record.error}"
            refused = record.status in ("blocked", "not allowed")
            advice = "" if refused else "`alignprop plugins --traceback` shows the traceback."
            yield Finding(what, "warning", found, advice)
    if not any(record.status == "loaded" for record in registry.plugins):
        advice = "Rewards and models are plugins: pip install alignprop-starter alignprop-jpeg"
        yield Finding("plugins", "warning", "none is loaded", advice)
    for kind in ("rewards", "models", "families", "prompts"):
        owners: dict[str, list[str]] = {}
        for offer in getattr(registry, kind)():
            owners.setdefault(offer.name, []).append(offer.full_name)
        for name, full_names in owners.items():
            if len(full_names) > 1:
                advice = f"Write {' or '.join(full_names)} in run configs, or block one of them with {BLOCK_VARIABLE}."
                yield Finding(f"{kind}: {name}", "warning", f"offered by {len(full_names)} plugins", advice)
    here = {record.distribution for record in registry.plugins}
    for variable in (ALLOW_VARIABLE, BLOCK_VARIABLE):
        for name in sorted((names_in(os.environ.get(variable)) or frozenset()) - here):
            yield Finding(variable, "warning", f"names {name}, which is not an installed plugin", "Check the spelling.")


def _disk() -> Iterator[Finding]:
    for what, folder in (("disk, working directory", Path.cwd()), ("disk, hub cache", _hub_cache())):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        found = f"{free / 1e9:.1f} GB free at {folder}"
        if not os.access(there, os.W_OK):
            advice = "Choose another output folder, or set HF_HOME."
            yield Finding(what, "warning", f"{folder} is not writable", advice)
        elif free < LOW_DISK_BYTES:
            yield Finding(what, "warning", found, "Downloads and checkpoints may not fit.")
        else:
            yield Finding(what, "ok", found)


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()


def _hub() -> Iterator[Finding]:
    true = ("1", "ON", "YES", "TRUE")
    on = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name, "").upper() in true]
    if on:
        advice = "Models and weights are read from the local cache only; unset the variable to download."
        yield Finding("hub", "ok", f"offline ({', '.join(on)} is set)", advice)
    else:
        advice = "The connection was not tested; HF_HUB_OFFLINE=1 restricts runs to the local cache."
        yield Finding("hub", "ok", "not set to offline: a run downloads its base model", advice)


def _threads() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", "")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    spins = os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE" and threads != "1"
    if threads.isdecimal() and int(threads) > cores:
        found = f"OMP_NUM_THREADS={threads} on {cores} cores"
        yield Finding("threads", "warning", found, f"Set it to {cores} or less.")
    elif load > cores and spins:
        # Threads that spin while they wait on busy cores make a step up to a hundred times slower.
        found = f"{cores} cores with a load of {load:.1f}"
        advice = "On busy cores unset OMP_WAIT_POLICY, or set it to PASSIVE."
        yield Finding("threads", "warning", found, advice)
    else:
        yield Finding("threads", "ok", f"{cores} cores")
