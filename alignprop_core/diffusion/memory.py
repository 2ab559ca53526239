"""Checkpointing decisions: how many bytes a graph would store, and how many are available."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import psutil
import torch
from torch import Tensor, nn

from alignprop_core.config.model import BackpropConfig
from alignprop_core.diffusion.calls import NetworkCalls
from alignprop_core.diffusion.families.base import Conditioning
from alignprop_core.diffusion.truncation import Truncation

_MEMORY_SHARE = 0.6
"""Share of the available memory that a stored graph may take; the rest is for its backward pass."""


class Checkpointing:
    """Decides whether steps and decoder are stored for the backward pass, or recomputed in it.

    A decision is made once for each size, by the memory available then.

    Args:
        calls: the networks.
        timestep: a timestep of the scheduler, 0-dim.
        latent_shape: (C, h, w) of one latent.
        backprop: the `backprop` section of the run config.
    """

    def __init__(
        self, calls: NetworkCalls, timestep: Tensor, latent_shape: tuple[int, int, int], backprop: BackpropConfig
    ) -> None:
        self._calls, self._timestep, self._latent_shape, self._backprop = calls, timestep, latent_shape, backprop
        self._bytes: dict[str, int] = {}
        self._decisions: dict[tuple[str, int], bool] = {}
        self._decoder_recomputes: bool | None = None

    def recomputes_steps(self, truncation: Truncation, conditioning: Conditioning) -> bool:
        """Return whether the kept steps are recomputed for a batch with this conditioning."""
        setting = self._backprop.checkpoint_steps
        copies = len(conditioning) * (len(truncation.kept) + self._backprop.lv_samples)
        if setting == "auto" and ("step", copies) not in self._decisions:

            def one_step() -> Tensor:
                latent = torch.zeros(1, *self._latent_shape, device=self._calls.device, dtype=self._calls.dtype)
                first = Conditioning.cat([conditioning[:1]])  # a copy: a slice would count the whole batch's storage
                # With the layers' own forwards, which store a little more than the cheaper ones.
                return self._calls.predict(latent, self._timestep, first, {})

            self._decide("step", copies, one_step, self._calls.family.denoiser)
        return self._decisions["step", copies] if setting == "auto" else setting

    def prepare_decoder(self, latents: Tensor) -> None:
        """Make the decoder recompute its blocks, or store them, for these latents (b, C, h, w)."""
        setting, copies = self._backprop.checkpoint_decoder, len(latents)
        if setting == "auto" and ("decoder", copies) not in self._decisions:
            self._calls.family.checkpoint_decoder(False)
            self._decoder_recomputes = False
            latent = latents[:1].detach().requires_grad_()
            self._decide("decoder", copies, lambda: self._calls.decode(latent), self._calls.family.decoder)
        wanted = self._decisions["decoder", copies] if setting == "auto" else setting
        if wanted != self._decoder_recomputes:
            self._calls.family.checkpoint_decoder(wanted)
            self._decoder_recomputes = wanted

    def _decide(self, part: str, copies: int, run: Callable[[], Tensor], network: nn.Module) -> None:
        if part not in self._bytes:
            self._bytes[part] = graph_bytes(run, [network])
        available = available_bytes(self._calls.device)
        self._decisions[part, copies] = self._bytes[part] * copies > _MEMORY_SHARE * available


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
