"""CUDA graphs: functions of tensors, recorded once and replayed, so that the GPU does not wait for Python.

All graphs share one memory pool, whose size is that of the largest. A replay may overwrite what another graph left
there: results are copied out, and what must outlive a replay is allocated outside of a capture.
"""

from __future__ import annotations

import gc
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

Outputs = Sequence[Tensor]

SHAPES = 4
"""Number of batch shapes whose graphs are kept: a run has its batch's, and perhaps those of a smaller rest."""

_SWITCHES = (
    *("training", "processor", "forward", "gradient_checkpointing", "use_slicing", "use_tiling"),
    *("s1", "s2", "b1", "b2"),  # FreeU
)
"""Attributes of modules that decide what a graph contains: in their `__dict__` if they are set."""


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
        device: the networks' device.

    Attributes:
        enabled: False after a capture has failed.
        replays: number of replays so far; what a replay has left in the pool is intact until the next.
    """

    def __init__(self, enabled: bool, device: torch.device) -> None:
        self.enabled, self.replays, self._device = enabled, 0, device
        self._handle: Any = None
        self._captured: WeakSet[Call] = WeakSet()

    def refuse(self, reason: str) -> None:
        """Capture nothing from now on, free the graphs, and show a warning."""
        self.enabled = False
        self.clear()
        warnings.warn(
            f"CUDA graphs are off: {reason}. Results are the same, steps are slower; backprop.cuda_graphs=false hides "
            "this warning.",
            stacklevel=3,
        )

    def clear(self) -> None:
        """Free the graphs and their memory; calls are captured again when they are needed."""
        for call in self._captured:
            call.graph = None
        self._handle = None
        gc.collect()
        torch.cuda.empty_cache()

    def capture(self, calls: Sequence[Call]) -> None:
        """Capture calls in this order; if one fails, none is captured any more.

        Those that allocate the largest tensors come first: others fit into parts of their memory, but not vice versa.
        """
        if not calls:
            return
        # Tensors that last must not be inference tensors, which no later gradient can be computed with.
        with torch.cuda.device(self._device), torch.inference_mode(False):
            reason = self._try(calls)
            if reason == _NO_MEMORY:
                # The trial needs as much again as the graphs of other shapes: without those it may fit.
                self.clear()
                reason = self._try(calls)
        if reason:
            self.refuse(reason)

    def _try(self, calls: Sequence[Call]) -> str:
        """Capture calls; return why they cannot be captured, "" if they are."""
        static = [[tensor.detach().clone() for tensor in call.shapes] for call in calls]

        def trial() -> None:
            for call, tensors in zip(calls, static, strict=True):
                call.function(*tensors)  # no result is kept: what led to it would stay in memory

        stream, reason, captured = torch.cuda.current_stream(), "", False
        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        try:
            # All trials run before the first capture: their memory is free again before the graphs take theirs.
            _warm_up(trial)
            for call, tensors in zip(calls, static, strict=True):
                call.graph = Graph(call.function, tensors, self, self._handle)
                self._captured.add(call)
            captured = True
        except RuntimeError as error:
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            short = isinstance(error, torch.OutOfMemoryError)
            reason = _NO_MEMORY if short else f"capturing failed ({first})"
            traceback.clear_frames(error.__traceback__)  # they keep the failed call's tensors alive
        finally:
            torch.cuda.set_stream(stream)
            if not captured:
                for call in calls:
                    call.graph = None
        return reason


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
            # Detached, so that autograd's graph is freed and only the results stay allocated in the pool.
            self._outputs = [output.detach() for output in function(*inputs)]

    def __call__(self, *inputs: Tensor) -> Outputs:
        """Return copies of the results for these inputs."""
        for static, given in zip(self._inputs, inputs, strict=True):
            static.copy_(given, non_blocking=True)
        self._graph.replay()
        self._pool.replays += 1
        return [output.clone() for output in self._outputs]


_NO_MEMORY = "not enough memory to capture them"

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
    try:
        with torch.cuda.stream(side):
            run()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Synchronization debug mode")
                torch.cuda.set_sync_debug_mode("error")
                try:
                    run()
                finally:
                    torch.cuda.set_sync_debug_mode(mode)
    finally:
        torch.cuda.current_stream().wait_stream(side)


def obstacle(network: nn.Module) -> str | None:
    """Return what keeps a network from being captured; None if nothing does."""
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on, which keeps copies of weights that a graph would not update"
    for name, module in network.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        # accelerate and diffusers replace `forward` for offloading and caching; a replay would not call it.
        if any(hooks) or hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook"):
            return f"{type(network).__name__}{f'.{name}' if name else ''} has a hook"
    if any(type(parameter) not in (nn.Parameter, Tensor) for parameter in network.parameters()):
        return f"{type(network).__name__} has quantized weights, whose addresses are not known"
    return None


def state_of(network: nn.Module) -> tuple[Any, ...]:
    """Return what a captured network depends on beside its inputs: another value needs another capture."""
    tensors = (*network.parameters(), *network.buffers())
    switches = tuple(tuple(module.__dict__.get(name) for name in _SWITCHES) for module in network.modules())
    return network, hash(tuple((tensor.data_ptr(), tensor.requires_grad) for tensor in tensors)), switches
