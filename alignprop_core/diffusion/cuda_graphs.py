"""CUDA graphs: functions of tensors, recorded once and replayed, so that the GPU does not wait for Python.

All graphs share one memory pool, whose size is that of the largest. A replay may overwrite what another graph left
there: results are copied out, and what must outlive a replay is allocated outside of a capture.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Outputs = Sequence[Tensor]


class Pool:
    """The graphs' memory, and whether functions can be captured at all.

    Args:
        enabled: False captures nothing.

    Attributes:
        enabled: False after a capture has failed.
        replays: number of replays so far; what a replay has left in the pool is intact until the next.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled, self.replays = enabled, 0
        self._handle: Any = None

    def refuse(self, reason: str) -> None:
        """Capture nothing from now on, and show a warning."""
        self.enabled = False
        warnings.warn(
            f"The model is not run as CUDA graphs: {reason}. Steps are correct but slower; backprop.cuda_graphs=false "
            "hides this warning.",
            stacklevel=3,
        )

    def capture(self, functions: Sequence[Callable[..., Outputs]], inputs: Sequence[Sequence[Tensor]]) -> list[Graph]:
        """Capture functions that are always called in this order; returns their graphs, or none if that fails.

        Args:
            functions: work on the tensors they are passed and on tensors that exist already; may leave tensors for the
                functions after them.
            inputs: for each function, tensors of the shapes it will be called with.
        """
        static = [[tensor.detach().clone() for tensor in tensors] for tensors in inputs]

        def run() -> list[Outputs]:
            return [function(*tensors) for function, tensors in zip(functions, static, strict=True)]

        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        stream = torch.cuda.current_stream()
        try:
            _warm_up(run)
            graphs = [Graph(f, tensors, self, self._handle) for f, tensors in zip(functions, static, strict=True)]
        except (RuntimeError, NotImplementedError) as error:  # OutOfMemoryError is a RuntimeError
            torch.cuda.set_stream(stream)
            torch.cuda.empty_cache()
            if isinstance(error, torch.OutOfMemoryError):
                self.refuse("memory does not suffice for capturing them")
            else:
                self.refuse(f"capturing them failed ({str(error).strip().splitlines()[0]})")
            return []
        return graphs


class Graph:
    """A function of tensors as a CUDA graph.

    Args:
        function: what is captured.
        inputs: the tensors that every replay reads.
        pool: counts its replays.
        handle: of the pool's memory.
    """

    def __init__(self, function: Callable[..., Outputs], inputs: Sequence[Tensor], pool: Pool, handle: Any) -> None:
        self._inputs, self._pool = inputs, pool
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's watchdog, may call CUDA meanwhile.
        with torch.cuda.graph(self._graph, pool=handle, capture_error_mode="thread_local"):
            self._outputs = function(*inputs)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Return copies of the results for these inputs."""
        for static, given in zip(self._inputs, inputs, strict=True):
            static.copy_(given, non_blocking=True)
        self._graph.replay()
        self._pool.replays += 1
        return [output.detach().clone() for output in self._outputs]


def _warm_up(run: Callable[[], object]) -> None:
    """Run twice without capturing: to initialize libraries, and to find out whether the host waits for the GPU.

    During a capture, waiting would leave CUDA and torch's allocator in a bad state; here it is an ordinary error.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    mode = torch.cuda.get_sync_debug_mode()
    with torch.cuda.stream(side):
        run()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Synchronization debug mode")
            torch.cuda.set_sync_debug_mode("error")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.current_stream().wait_stream(side)


def obstacle(network: nn.Module) -> str | None:
    """Return what keeps a network from being captured: a hook, which a replay would not call; None if nothing does."""
    for name, module in network.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        if any(hooks) or hasattr(module, "_hf_hook"):
            return f"{type(network).__name__}{f'.{name}' if name else ''} has a hook"
    return None


def state_of(network: nn.Module) -> tuple[Any, ...]:
    """Return what a captured network depends on beside its inputs: another value needs another capture."""
    addresses = (tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers()))
    return id(network), network.training, getattr(network, "is_gradient_checkpointing", False), hash(tuple(addresses))
