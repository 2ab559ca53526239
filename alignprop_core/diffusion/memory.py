"""How many bytes a graph stores for its backward pass, and how many are available."""

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
    """Return the bytes a process can still allocate on this device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # The caching allocator holds reserved blocks that are free for this process but not for the driver.
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # Apple GPUs share the machine's memory.
    return int(psutil.virtual_memory().available)
