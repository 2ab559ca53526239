"""The checks of `alignprop doctor`. Only the look at accelerators imports torch."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from alignprop_core import __version__
from alignprop_core.registry.discovery import ALLOW_VARIABLE, BLOCK_VARIABLE, CORE, names_in
from alignprop_core.registry.registry import Registry

Status = Literal["ok", "warning", "error"]

LOW_DISK_BYTES = 5e9
"""A Stable Diffusion 1.5 download is about 4 GB, and a checkpoint must fit beside the last one."""


@dataclass(frozen=True)
class Finding:
    """What one check found, and what to do about it."""

    what: str
    status: Status
    found: str
    advice: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the finding for `--json`."""
        return asdict(self)


def check_all(registry: Registry, *, quick: bool) -> list[Finding]:
    """Run all checks.

    Args:
        registry: the plugins to report.
        quick: leave out what needs torch.
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
    """Compare installed versions with what the core's own metadata requires; imports none of them."""
    try:
        lines = requires(CORE) or []
    except PackageNotFoundError:
        yield Finding(CORE, "warning", "not installed as a package", "Install it: pip install -e . in its checkout.")
        return
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        mend = f'pip install -U "{requirement.name}{requirement.specifier}"'
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            yield Finding(requirement.name, "error", "not installed", mend)
            continue
        if requirement.specifier.contains(installed, prereleases=True):
            yield Finding(requirement.name, "ok", installed)
        else:
            yield Finding(requirement.name, "error", f"{installed}, needed is {requirement.specifier}", mend)


def _accelerators() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:
        yield Finding(
            "torch", "error", f"cannot be imported: {error}", "Reinstall torch for this machine: pytorch.org."
        )
        return
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(i)
            free, total = torch.cuda.mem_get_info(i)
            bf16 = "bf16" if facts.major >= 8 else "no bf16: use fp16"
            memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
            yield Finding(f"cuda:{i}", "ok", f"{facts.name}, {memory}, {bf16}")
    elif torch.backends.mps.is_available():
        fallback = os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK") == "1"
        advice = "" if fallback else "If an operation is missing there, set PYTORCH_ENABLE_MPS_FALLBACK=1."
        yield Finding("mps", "ok", "Apple GPU", advice)
    elif shutil.which("nvidia-smi") and torch.version.cuda is None:
        yield Finding(
            "accelerator",
            "warning",
            f"an NVIDIA driver is here, but torch {torch.__version__} is built without CUDA",
            "Install a CUDA build of torch: pytorch.org.",
        )
    elif shutil.which("nvidia-smi"):
        yield Finding(
            "accelerator",
            "warning",
            f"an NVIDIA driver is here, but torch (CUDA {torch.version.cuda}) finds no device",
            "See whether nvidia-smi lists one, CUDA_VISIBLE_DEVICES hides it, or the driver is too old.",
        )
    else:
        found = "none: runs use the CPU"
        yield Finding("accelerator", "ok", found, "Small models train on a CPU; Stable Diffusion wants a GPU.")


def _plugins(registry: Registry) -> Iterator[Finding]:
    for record in registry.plugins:
        offers = sum(len(specs) for specs in record.offers.values())
        what = f"plugin {record.distribution}"
        if record.status == "loaded":
            found = f"{record.version}, {offers} offer{'s' if offers != 1 else ''}"
            yield Finding(what, "warning" if record.warnings else "ok", found, "; ".join(record.warnings))
        else:
            found = f"{record.version}, {record.status}: {record.error}"
            advice = "" if record.status in ("blocked", "not allowed") else "`alignprop plugins --traceback` says more."
            yield Finding(what, "warning", found, advice)
    if not any(record.status == "loaded" for record in registry.plugins):
        advice = "Rewards and models come as plugins: pip install alignprop-starter alignprop-jpeg"
        yield Finding("plugins", "warning", "none is loaded", advice)
    for kind in ("rewards", "models", "families", "prompts"):
        count = Counter(offer.name for offer in getattr(registry, kind)())
        for name in (name for name, times in count.items() if times > 1):
            owners = [offer.full_name for offer in getattr(registry, kind)() if offer.name == name]
            advice = f"Write {' or '.join(owners)} in run configs, or keep one out with {BLOCK_VARIABLE}."
            yield Finding(f"{kind}: {name}", "warning", f"offered by {len(owners)} plugins", advice)
    here = {record.distribution for record in registry.plugins}
    for variable in (ALLOW_VARIABLE, BLOCK_VARIABLE):
        for name in sorted((names_in(os.environ.get(variable)) or frozenset()) - here):
            yield Finding(variable, "warning", f"names {name}, which is not an installed plugin", "See its spelling.")


def _disk() -> Iterator[Finding]:
    for what, folder in (("disk, working directory", Path.cwd()), ("disk, hub cache", _hub_cache())):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        found = f"{free / 1e9:.1f} GB free at {folder}"
        if not os.access(there, os.W_OK):
            yield Finding(
                what, "warning", f"{folder} cannot be written", "Choose another place for output, or HF_HOME."
            )
        elif free < LOW_DISK_BYTES:
            yield Finding(what, "warning", found, "Downloads and checkpoints may not fit.")
        else:
            yield Finding(what, "ok", found)


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()


def _hub() -> Iterator[Finding]:
    on = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_on(name)]
    if on:
        advice = "Models and weights come from the local cache only; unset it to download."
        yield Finding("hub", "ok", f"offline ({', '.join(on)} is set)", advice)
    else:
        advice = "Whether the hub can be reached was not tried; HF_HUB_OFFLINE=1 keeps runs to the local cache."
        yield Finding("hub", "ok", "not set to offline: a run downloads the base model it names", advice)


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")


def _threads() -> Iterator[Finding]:
    cores = os.process_cpu_count() if hasattr(os, "process_cpu_count") else len(_affinity())
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads) > cores:
        yield Finding(
            "threads", "warning", f"OMP_NUM_THREADS={threads} on {cores} cores", f"Set it to {cores} or less."
        )
        return
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    waits = os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE" or threads == "1"
    if load > cores and not waits:
        # Spinning threads that wait for one another on busy cores make a step up to a hundred times slower.
        found = f"{cores} cores with a load of {load:.1f}"
        yield Finding("threads", "warning", found, "On busy cores set OMP_WAIT_POLICY=PASSIVE, or OMP_NUM_THREADS=1.")
    else:
        yield Finding("threads", "ok", f"{cores} cores")


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
