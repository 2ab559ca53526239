"""Checkpointing decisions: how many bytes a graph would store, and how many are available."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import psutil
import torch
from torch import Tensor, nn

_MEMORY_SHARE = 0.6
"""Share of the available memory that a stored graph may take; the rest is for its backward pass."""


class Checkpointing:
    """Decides whether a part of the graph is stored, or recomputed in the backward pass.

    Args:
        device: where the graph is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bytes: dict[str, int] = {}

    def needed(self, setting: Literal["auto"] | bool, part: str, copies: int, measure: Callable[[], int]) -> bool:
        """Return whether a part of the graph must be recomputed.

        Args:
            setting: what the run config demands; "auto" decides by memory.
            part: name of the part; it is measured once.
            copies: how many times the graph stores what `measure` measures.
            measure: returns the bytes of one copy.
        """
        if setting != "auto":
            return setting
        if part not in self._bytes:
            self._bytes[part] = measure()
        return self._bytes[part] * copies > _MEMORY_SHARE * available_bytes(self._device)


def graph_bytes(run: Callable[[], Tensor], modules: Iterable[nn.Module]) -> int:
    """Run once with gradients on and return the bytes autograd saved for its backward pass.

    Storages shared between saved tensors count once; the modules' own parameters and buffers do not count.
    """
    owned = {t.untyped_storage().data_ptr() for m in modules for t in (*m.parameters(), *m.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(saved.values())


def available_bytes(device: torch.device) -> int:
    """Return the bytes a process can still allocate on this device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # The caching allocator holds reserved blocks that are free for this process but not for the driver.
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # Apple GPUs share the machine's memory.
    return int(psutil.virtual_memory().available)
