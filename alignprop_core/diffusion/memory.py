"""What is in memory at a time: stored or recomputed, the whole batch or a part of it, by measurements of one sample."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import psutil
import torch
from torch import Tensor, nn

from alignprop_core.config.model import BackpropConfig
from alignprop_core.diffusion.calls import NetworkCalls
from alignprop_core.diffusion.cpu import Forwards, replaced

_SHARE = {"cpu": 0.6, "cuda": 0.85}
"""Share of the available memory that may be used: on a CPU for stored graphs, whose backward pass needs the rest; on
CUDA for a backward pass with all it needs, beside the rewards'."""

Network = Literal["denoiser", "decoder"]
One = Callable[[bool], tuple[Tensor, Sequence[Tensor], Forwards]]
"""Runs a network for one sample, and whether its blocks run again in the backward pass: its output, the tensors that a
backward pass leads to, and the layers' forwards, which the backward pass needs where blocks run again."""


@dataclass(frozen=True)
class Level:
    """How a batch is computed.

    Attributes:
        samples: denoised at a time.
        images: decoded at a time; None is all.
        graphs: how many kept steps, each of one sample, may store their graphs; all others are called again in the
            backward pass.
        blocks: whether the denoiser's blocks run again in the backward pass.
        decoder: whether the decoder's do.
        peak: bytes that the networks need at their peak beside their weights; 0 if not on CUDA.
    """

    samples: int
    images: int | None
    graphs: float
    blocks: bool
    decoder: bool
    peak: int = 0

    def __str__(self) -> str:
        parts = [name for name, on in (("denoiser", self.blocks), ("decoder", self.decoder)) if on]
        return (
            f"block checkpointing {'in ' + ' and '.join(parts) if parts else 'off'}, {self.samples} samples denoised "
            f"and {self.images or 'all'} decoded at a time"
        )


class Memory:
    """Chooses what is recomputed in the backward pass, and how many samples are computed at a time.

    "auto" and null are decided by the memory that was available when a network was first measured.

    Args:
        calls: the networks.
        backprop: the `backprop` section of the run config.
        one: runs a network for one sample.

    Attributes:
        static: bytes on the GPU before anything was computed: weights and other tensors that stay.
    """

    def __init__(self, calls: NetworkCalls, backprop: BackpropConfig, one: dict[Network, One]) -> None:
        self._calls, self._one, self._backprop = calls, one, backprop
        self._on_gpu = calls.device.type == "cuda"
        self._measured: dict[tuple[Network, bool], int] = {}
        self._levels: dict[int, Level] = {}
        self._available: int | None = None
        self._level: Level | None = None
        self.static = 0

    def level(self, batch: int) -> Level:
        """Choose how a batch of this size is computed, and make the denoiser recompute its blocks or not.

        On CUDA, smaller batches are computed like the first one, of which they are parts.
        """
        if batch not in self._levels:
            larger = [level for size, level in self._levels.items() if size > batch]
            if self._on_gpu and larger:
                self._levels[batch] = replace(larger[0], samples=min(batch, larger[0].samples))
            else:
                self._levels[batch] = self._on_cuda(batch) if self._on_gpu else self._elsewhere(batch)
        self._level = self._levels[batch]
        # Always: another sampler or the user may have switched it.
        self._calls.family.checkpoint_denoiser(self._level.blocks)
        return self._level

    def recomputes_decoder(self, rows: int) -> bool:
        """Return whether the decoder recomputes its layers for so many images."""
        setting = self._backprop.checkpoint_decoder
        if setting == "auto" and self._on_gpu and self._level is not None:
            setting = self._level.decoder
        elif setting == "auto":
            setting = rows * self._of_one("decoder", recomputes=False) > self._share
        return bool(setting)

    def savings(self, batch: int) -> list[tuple[str, int]]:
        """Return the settings that would reduce what a batch needs, with the bytes saved, largest first; CUDA only."""
        level = self.level(batch)
        half, images = max(1, level.samples // 2), min(batch, level.images or batch)
        now = self._peak(level.samples, level.blocks, images, level.decoder)
        others = {
            "backprop.checkpoint_blocks=true": (level.samples, True, images, level.decoder),
            "backprop.checkpoint_decoder=true": (level.samples, level.blocks, images, True),
            "backprop.decode_batch_size=1": (level.samples, level.blocks, 1, level.decoder),
            f"backprop.sample_batch_size={half}": (half, level.blocks, min(images, half), level.decoder),
            "backprop.checkpoint_blocks=true backprop.checkpoint_decoder=true backprop.decode_batch_size=1": (
                level.samples,
                True,
                1,
                True,
            ),
        }
        found = [(setting, now - self._peak(*other)) for setting, other in others.items()]
        return sorted([pair for pair in found if pair[1] > 0], key=lambda pair: -pair[1])

    # -- inside -------------------------------------------------------------------------------------------------

    def _elsewhere(self, batch: int) -> Level:
        backprop = self._backprop
        steps, blocks = backprop.checkpoint_steps, backprop.checkpoint_blocks
        if "auto" in (steps, blocks):
            fitting = self._share / self._of_one("denoiser", recomputes=False)
        return Level(
            samples=min(batch, backprop.sample_batch_size or batch),
            images=backprop.decode_batch_size,
            graphs=fitting if steps == "auto" else 0 if steps else math.inf,
            blocks=batch > fitting if blocks == "auto" else blocks,
            decoder=backprop.checkpoint_decoder is True,
        )

    def _on_cuda(self, batch: int) -> Level:
        backprop, blocks = self._backprop, self._backprop.checkpoint_blocks
        samples, images = backprop.sample_batch_size, backprop.decode_batch_size
        one_image = self._of_one("decoder", recomputes=False)  # all is measured before anything is captured
        if blocks == "auto":
            blocks = min(batch, samples or batch) * self._of_one("denoiser", recomputes=False) > self._share
        one = self._of_one("denoiser", recomputes=blocks)
        samples = samples or part_of(batch, int(self._share // one))
        samples = min(batch, samples)
        decoder = backprop.checkpoint_decoder
        if decoder == "auto":
            # Both networks use the same memory: it need not grow for a decoder, which is called once.
            decoder = one_image > samples * one or (images or 1) * one_image > self._share
        if decoder:
            one_image = self._of_one("decoder", recomputes=True)
        # As many as need no more than the denoiser: their memory is the same.
        images = images or part_of(samples * (1 + backprop.lv_samples), int(samples * one // one_image))
        # A GPU repeats a network call in less time than its memory is worth: no graph is stored unless it is wanted.
        graphs = math.inf if backprop.checkpoint_steps is False else 0
        peak = self._peak(samples, blocks, min(images, batch), decoder)
        return Level(samples, images, graphs, blocks, decoder, peak)

    @property
    def _share(self) -> float:
        """Bytes that may be used."""
        if self._available is None:
            self._available = available_bytes(self._calls.device)
            if self._on_gpu:
                self.static = torch.cuda.memory_allocated(self._calls.device)
        return _SHARE.get(self._calls.device.type, 0.6) * self._available

    def _of_one(self, network: Network, *, recomputes: bool) -> int:
        """Return the bytes for one sample: of the stored graph, on CUDA of the whole forward and backward pass."""
        if (network, recomputes) not in self._measured:
            _ = self._share  # before the measurement fills caches
            run = partial(self._one[network], recomputes)
            if self._on_gpu:
                # Of the decoder with all activations until the end: so its backward pass can be repeated.
                found = peak_bytes(run, self._calls.device, keeps=network == "decoder")
            else:
                found = graph_bytes(lambda: run()[0], [getattr(self._calls.family, network)])
            self._measured[network, recomputes] = max(found, 1)
        return self._measured[network, recomputes]

    def _peak(self, samples: int, blocks: bool, images: int, decoder: bool) -> int:
        one, one_image = self._of_one("denoiser", recomputes=blocks), self._of_one("decoder", recomputes=decoder)
        return max(samples * one, images * one_image)


def part_of(batch: int, limit: int) -> int:
    """Return how many of a batch are computed at a time: at most `limit`, and the same number each time if possible.

    Every other number is another shape, which needs another capture.
    """
    limit = min(batch, max(1, limit))
    equal = [size for size in range(limit, limit // 2, -1) if batch % size == 0]
    return equal[0] if equal else -(-batch // -(-batch // limit))


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


def peak_bytes(
    run: Callable[[], tuple[Tensor, Sequence[Tensor], Forwards]], device: torch.device, *, keeps: bool = False
) -> int:
    """Run a network forward and backward on a GPU; return the bytes it needed at its peak.

    Args:
        run: runs it forward.
        device: the GPU.
        keeps: keep the graph until the backward pass has ended.
    """
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with torch.enable_grad():
        output, inputs, forwards = run()
        with replaced(forwards):
            torch.autograd.grad(output, inputs, torch.ones_like(output), allow_unused=True, retain_graph=keeps)
    return torch.cuda.max_memory_allocated(device) - before


def available_bytes(device: torch.device) -> int:
    """Return the bytes a process can still allocate on this device."""
    if device.type == "cuda":
        gc.collect()  # a sampler that is no longer used may still have its graphs
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        # A process may be limited to a fraction of the device; older versions of torch do not tell.
        fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)
        allowed = int(total * fraction)
        return min(free, allowed - torch.cuda.memory_reserved(device))
    # Apple GPUs share the machine's memory.
    return int(psutil.virtual_memory().available)
