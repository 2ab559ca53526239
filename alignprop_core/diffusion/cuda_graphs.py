"""CUDA graphs: functions of tensors, recorded once and replayed, so that the GPU does not wait for Python.

All graphs share one memory pool, whose size is that of the largest. A replay may overwrite what another graph left
there: results are copied out, and what must outlive a replay is allocated outside of a capture.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

Outputs = Sequence[Tensor]


@dataclass(eq=False)
class Call:
    """A function of tensors, and its graph once it is captured.

    Attributes:
        function: works on the tensors it is passed and on tensors that exist before the capture; may leave tensors for
            calls that are captured after it.
        shapes: tensors of the shapes it is called with.
        graph: its graph; None if it has to run eagerly.
    """

    function: Callable[..., Outputs]
    shapes: Sequence[Tensor]
    graph: Graph | None = None

    def __call__(self, *inputs: Tensor) -> Outputs:
        """Return the results for these inputs."""
        return self.function(*inputs) if self.graph is None else self.graph(*inputs)


class Pool:
    """The graphs' memory, and whether calls are captured at all.

    Args:
        enabled: False captures nothing.

    Attributes:
        enabled: False after a capture has failed.
        replays: number of replays so far; what a replay has left in the pool is intact until the next.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled, self.replays = enabled, 0
        self._handle: Any = None
        self._captured: WeakSet[Call] = WeakSet()

    def refuse(self, reason: str) -> None:
        """Capture nothing from now on, free the graphs, and show a warning."""
        self.release()
        warnings.warn(
            f"The model is not run as CUDA graphs: {reason}. Steps are correct but slower; backprop.cuda_graphs=false "
            "hides this warning.",
            stacklevel=3,
        )

    def release(self) -> None:
        """Free the graphs, and capture nothing from now on."""
        self.enabled = False
        for call in self._captured:
            call.graph = None
        torch.cuda.empty_cache()

    def capture(self, calls: Sequence[Call]) -> None:
        """Capture calls in this order; if one fails, none is captured any more.

        Those that allocate the largest tensors come first: others fit into parts of their memory, but not vice versa.
        """
        if not calls:
            return
        static = [[tensor.detach().clone() for tensor in call.shapes] for call in calls]
        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        stream = torch.cuda.current_stream()
        try:
            # All trials before the first capture: their memory is returned to the driver before the graphs take theirs.
            _warm_up(lambda: [call.function(*tensors) for call, tensors in zip(calls, static, strict=True)])
            for call, tensors in zip(calls, static, strict=True):
                call.graph = Graph(call.function, tensors, self, self._handle)
                self._captured.add(call)
        except (RuntimeError, NotImplementedError) as error:  # OutOfMemoryError is a RuntimeError
            torch.cuda.set_stream(stream)
            short = isinstance(error, torch.OutOfMemoryError)
            reason = str(error).strip().splitlines()[0]
        else:
            return
        # Outside of the handler, whose traceback keeps the failed call's tensors alive.
        for call in calls:
            call.graph = None
        self.refuse("memory does not suffice for it" if short else f"that failed ({reason})")


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
        with torch.cuda.graph(self._graph, handle, _side_stream(), capture_error_mode="thread_local"):
            # Without what led to them: only the results stay allocated in the pool.
            self._outputs = [output.detach() for output in function(*inputs)]

    def __call__(self, *inputs: Tensor) -> Outputs:
        """Return copies of the results for these inputs."""
        for static, given in zip(self._inputs, inputs, strict=True):
            static.copy_(given, non_blocking=True)
        self._graph.replay()
        self._pool.replays += 1
        return [output.clone() for output in self._outputs]


_side_streams: dict[int, torch.cuda.Stream] = {}


def _side_stream() -> torch.cuda.Stream:
    """Return the stream for captures and their trials: always the same, since each one keeps workspaces of its own."""
    device = torch.cuda.current_device()
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    return _side_streams[device]


def _warm_up(run: Callable[[], object]) -> None:
    """Run twice without capturing: to initialize libraries, and to find out whether the host waits for the GPU.

    During a capture, waiting would leave CUDA and torch's allocator in a bad state; here it is an ordinary error.
    """
    side = _side_stream()
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
