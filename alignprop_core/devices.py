"""Devices and dtypes from plain strings, and the peak memory of a run."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
import warnings
from typing import TYPE_CHECKING

import torch

from alignprop_core.errors import DeviceError, under
from alignprop_core.specs import DEVICE_PATTERN

if TYPE_CHECKING:
    from accelerate import PartialState

_HALF = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def device_and_dtype(device: str, mixed_precision: str) -> tuple[torch.device, torch.dtype]:
    """Return the device of a run and the dtype of its frozen networks.

    Args:
        device: `training.device`: auto, cpu, mps, cuda or cuda:N.
        mixed_precision: `training.mixed_precision`: no, fp16 or bf16.

    Raises:
        DeviceError: naming the key to change.
    """
    with under("training.device"):
        chosen = choose_device(device)
    with under("training.mixed_precision"):
        return chosen, network_dtype(mixed_precision, chosen)


def choose_device(name: str) -> torch.device:
    """Return the device of a name: auto, cpu, mps, cuda or cuda:N.

    With several processes, `auto` and `cuda` give each its own GPU.

    Raises:
        DeviceError: there is no such name, or this machine has no such device.
    """
    if not re.fullmatch(DEVICE_PATTERN, name):
        raise DeviceError(f'must be auto, cpu, mps, cuda or cuda:N (as in cuda:0), not "{name}".')
    if name == "cpu":
        return torch.device("cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceError(
            f"{name} is requested, but PyTorch finds no CUDA device. Choose auto (or cpu), or install a driver and "
            "a PyTorch build for it; `alignprop doctor` shows the devices."
        )
    if name == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("mps is requested, but PyTorch finds no Apple GPU. Choose auto (or cpu).")
    if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count():
        raise DeviceError(f"{name} is requested, but the CUDA devices are 0 to {torch.cuda.device_count() - 1}.")
    if name in ("auto", "cuda"):
        device: torch.device = processes().device
        return device
    return torch.device(name)


def processes(*, cpu: bool = False) -> PartialState:
    """Return the processes of this run; one, with a warning, if a launcher's variables are incomplete.

    WORLD_SIZE may be left over from another program. Without MASTER_ADDR, which launchers set as well, no other process
    could be reached.

    Args:
        cpu: whether all run on the CPU.
    """
    from accelerate import PartialState

    left = [name for name in ("WORLD_SIZE", "LOCAL_RANK") if name in os.environ]
    if left and "MASTER_ADDR" not in os.environ:
        message = f"{' and '.join(left)} in the environment, but no launcher such as torchrun: running one process."
        warnings.warn(message, stacklevel=2)
        for name in left:
            del os.environ[name]
    return PartialState(cpu=cpu)


def network_dtype(mixed_precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the frozen networks; adapters, latents and scores stay in float32.

    Raises:
        DeviceError: the device cannot train in this format.
    """
    if mixed_precision == "fp16" and device.type == "cpu":
        raise DeviceError("fp16 needs a GPU: CPUs have no fast float16 and no loss scaling. Use bf16 or no on a CPU.")
    if mixed_precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise DeviceError("bf16 needs a GPU of 2020 or later; use fp16 on this one.")
    return _HALF[mixed_precision]


def peak_memory(device: torch.device) -> int:
    """Return bytes: the peak reserved on the GPU, or the peak of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> bool:
    """Let glibc keep large freed blocks instead of returning them to the system; return whether it does.

    A training step on a CPU allocates and frees gigabytes of activations. By default each large block is a fresh
    mapping whose pages fault in and are zeroed every time: 100,000 to 170,000 faults per step at the starter model's
    size, about a seventh of the processor time. The memory stays with the process until it ends. Values: mallopt(3),
    M_MMAP_THRESHOLD (-3; 32 MiB is its maximum) and M_TRIM_THRESHOLD (-1).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(-3, 32 << 20)) and bool(libc.mallopt(-1, 2**31 - 1))
