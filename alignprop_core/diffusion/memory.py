"""What is in memory at a time: stored or recomputed, the whole batch or a part of it, by measurements of one sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
One = Callable[[], tuple[Tensor, Sequence[Tensor], Forwards]]
"""Runs a network for one sample: its output, the tensors that a backward pass leads to, and the layers' forwards, which
the backward pass needs where blocks run again."""


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
        self._measured: dict[tuple[Network, bool], int] = {}
        self._enabled: dict[Network, bool] = {}
        self._available: int | None = None
        self._denoiser_peak = 0
        self.static = 0

    @property
    def available(self) -> float:
        """Bytes that may be used."""
        if self._available is None:
            self._available = available_bytes(self._calls.device)
            if self._calls.device.type == "cuda":
                self.static = torch.cuda.memory_allocated(self._calls.device)
        return _SHARE.get(self._calls.device.type, 0.6) * self._available

    def of_one(self, network: Network, *, recomputes: bool) -> int:
        """Return the bytes for one sample: of the stored graph, on CUDA of the whole forward and backward pass."""
        if (network, recomputes) not in self._measured:
            _ = self.available  # before the measurement fills caches
            before = self._enabled.get(network)
            self._recompute(network, recomputes)
            run = self._one[network]
            if self._calls.device.type == "cuda":
                found = peak_bytes(run, self._calls.device)
            else:
                found = graph_bytes(lambda: run()[0], [getattr(self._calls.family, network)])
            self._measured[network, recomputes] = max(found, 1)
            if before is not None:
                self._recompute(network, before)
        return self._measured[network, recomputes]

    def stores_steps(self, samples: int, kept: int) -> bool:
        """Return whether the kept network calls store their graphs, instead of running again in the backward pass."""
        setting = self._backprop.checkpoint_steps
        if setting == "auto" and self._calls.device.type == "cuda":
            # A GPU repeats a network call in less time than its memory is worth: K graphs or one.
            return False
        if setting == "auto":
            return samples * kept * self.of_one("denoiser", recomputes=False) <= self.available
        return not setting

    def recomputes(self, network: Network, samples: int) -> bool:
        """Return whether a network runs its blocks again in the backward pass, and make it do so."""
        backprop, on_gpu = self._backprop, self._calls.device.type == "cuda"
        setting = backprop.checkpoint_blocks if network == "denoiser" else backprop.checkpoint_decoder
        if setting == "auto":
            one = self.of_one(network, recomputes=False)
            setting = samples * one > self.available
            if on_gpu and network == "decoder" and self._denoiser_peak:
                # Both use the same memory: a decoder that runs twice costs less time than more memory is worth.
                setting = setting or one > self._denoiser_peak
        self._recompute(network, setting)
        if on_gpu and network == "denoiser":
            self._denoiser_peak = self.of_one(network, recomputes=setting) * self.samples(samples)
        return setting

    def samples(self, batch: int) -> int:
        """Return how many samples of a batch are denoised at a time: all, if memory suffices."""
        if self._backprop.sample_batch_size is not None or self._calls.device.type != "cuda":
            return min(batch, self._backprop.sample_batch_size or batch)
        smallest = self.of_one("denoiser", recomputes=self._backprop.checkpoint_blocks is not False)
        return max(1, min(batch, int(self.available // smallest)))

    def images(self, rows: int) -> int:
        """Return how many of these images are decoded at a time: on CUDA as many as need no more than the denoiser."""
        if self._backprop.decode_batch_size is not None or self._calls.device.type != "cuda":
            return min(rows, self._backprop.decode_batch_size or rows)
        one = self.of_one("decoder", recomputes=self.recomputes("decoder", 1))
        return max(1, min(rows, int((self._denoiser_peak or self.available) // one)))

    def peak(self, batch: int) -> int:
        """Return the bytes that a batch needs beside weights and rewards; on CUDA only."""
        self.recomputes("denoiser", batch)
        images = self.images(batch)
        # The denoiser and the decoder use the same memory.
        decoder = images * self.of_one("decoder", recomputes=self.recomputes("decoder", images))
        return max(self._denoiser_peak, decoder)

    def describe(self, batch: int) -> str:
        """Return in words what is recomputed and how much of a batch is computed at a time; on CUDA only."""
        images = self.images(batch)
        networks = {"denoiser": self.recomputes("denoiser", batch), "decoder": self.recomputes("decoder", images)}
        recomputed = " and ".join(network for network, on in networks.items() if on)
        return (
            f"block checkpointing {f'in {recomputed}' if recomputed else 'off'}, {self.samples(batch)} of {batch} "
            f"samples denoised at a time, {images} decoded"
        )

    def savings(self, batch: int) -> list[tuple[str, int]]:
        """Return the settings that would reduce what a batch needs, with the bytes saved, largest first; CUDA only."""
        samples, blocks = self.samples(batch), self.recomputes("denoiser", batch)
        images = self.images(batch)
        decoder = self.recomputes("decoder", images)
        one = {("denoiser", on): self.of_one("denoiser", recomputes=on) for on in {blocks, True}} | {
            ("decoder", on): self.of_one("decoder", recomputes=on) for on in {decoder, True}
        }

        def needed(samples: int, blocks: bool, images: int, decoder: bool) -> int:
            return max(samples * one["denoiser", blocks], images * one["decoder", decoder])

        half = max(1, samples // 2)
        others = {
            "backprop.checkpoint_blocks=true": (samples, True, images, decoder),
            "backprop.checkpoint_decoder=true": (samples, blocks, images, True),
            "backprop.decode_batch_size=1": (samples, blocks, 1, decoder),
            f"backprop.sample_batch_size={half}": (half, blocks, min(images, half), decoder),
            "backprop.checkpoint_blocks=true backprop.checkpoint_decoder=true backprop.decode_batch_size=1": (
                samples, True, 1, True
            ),
        }  # fmt: skip
        now = needed(samples, blocks, images, decoder)
        found = [(setting, now - needed(*other)) for setting, other in others.items()]
        return sorted([pair for pair in found if pair[1] > 0], key=lambda pair: -pair[1])

    def _recompute(self, network: Network, enabled: bool) -> None:
        if self._enabled.get(network) != enabled:
            self._calls.family.checkpoint(network, enabled)
            self._enabled[network] = enabled


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


def peak_bytes(run: One, device: torch.device) -> int:
    """Run a network forward and backward on a GPU; return the bytes it needed at its peak."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with torch.enable_grad():
        output, inputs, forwards = run()
        with replaced(forwards):
            torch.autograd.grad(output, inputs, torch.ones_like(output), allow_unused=True)
    return torch.cuda.max_memory_allocated(device) - before


def available_bytes(device: torch.device) -> int:
    """Return the bytes a process can still allocate on this device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        # A process may be limited to a fraction of the device.
        allowed = int(total * torch.cuda.get_per_process_memory_fraction(device))
        return min(free, allowed - torch.cuda.memory_reserved(device))
    # Apple GPUs share the machine's memory.
    return int(psutil.virtual_memory().available)
