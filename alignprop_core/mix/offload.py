"""Keep rewards' weights on the CPU between uses, so that several encoders fit on the GPU beside the model."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn


class Offload:
    """Context manager that keeps a frozen module's weights on a device while it is open.

    The weights never change, so the CPU's copy is kept and the device's is dropped: leaving is free, entering costs one
    copy from page-locked memory. Contexts of one module may be nested.

    Args:
        module: a frozen module on the CPU.
        device: where it is used.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device
        self._depth = 0
        module.to("cpu")
        pin = device.type == "cuda"
        self._home: list[tuple[Tensor, Tensor]] = []
        for tensor in (*module.parameters(), *module.buffers()):
            home = tensor.data.pin_memory() if pin else tensor.data
            tensor.data = home
            self._home.append((tensor, home))

    def __enter__(self) -> Offload:
        if self._depth == 0:
            for tensor, home in self._home:
                tensor.data = home.to(self._device, non_blocking=True)
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            for tensor, home in self._home:
                tensor.data = home
