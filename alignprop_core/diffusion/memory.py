"""How much memory a graph holds and how much there is: checkpointing is for where memory is short."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import psutil
import torch
from torch import Tensor, nn


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
    """Return the bytes a process could still take on this device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # Apple GPUs share the machine's memory.
    return int(psutil.virtual_memory().available)
