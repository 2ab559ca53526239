"""The interface between the sampler and a family of pipelines; one subclass per family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alignprop_core.config.model import SamplingConfig
from alignprop_core.diffusion.schedulers import Scheduler
from alignprop_core.errors import ConfigError


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts of a batch: named tensors with the batch first, as the denoiser takes them.

    Attributes:
        positive: name -> (B, ...).
        negative: name -> (B, ...), or None without guidance.
    """

    positive: Mapping[str, Tensor]
    negative: Mapping[str, Tensor] | None

    def __len__(self) -> int:
        return len(next(iter(self.positive.values())))

    def __getitem__(self, index: slice) -> Conditioning:
        """Return the conditioning of a part of the batch."""

        def cut(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value[index] for name, value in tensors.items()}

        return Conditioning(cut(self.positive), None if self.negative is None else cut(self.negative))

    @property
    def shapes(self) -> tuple[tuple[str, torch.Size], ...]:
        """Names and shapes of all tensors; those of the negative prompt follow."""
        return tuple((name, value.shape) for part in self._parts for name, value in part.items())

    def clone(self) -> Conditioning:
        """Return a copy."""
        return Conditioning.cat([self])

    def copy_(self, other: Conditioning) -> None:
        """Copy the values of another one of the same shapes."""
        for own, given in zip(self._parts, other._parts, strict=True):
            for name, value in own.items():
                value.copy_(given[name])

    @property
    def _parts(self) -> list[Mapping[str, Tensor]]:
        return [self.positive, *([] if self.negative is None else [self.negative])]

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Join conditionings along the batch."""

        def join(tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
            return {name: torch.cat([t[name] for t in tensors]) for name in tensors[0]}

        negatives = [part.negative for part in parts if part.negative is not None]
        return Conditioning(join([part.positive for part in parts]), join(negatives) if negatives else None)


def uncompiled(pipeline: Any) -> Any:
    """Replace the networks of a pipeline that `torch.compile` has wrapped by the networks; returns the pipeline.

    Adapters are attached to their layers, with which the compiled code would have to be compiled again.
    """
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    owners: list[tuple[Any, dict[str, nn.Module]]] = [(pipeline, networks)]
    while owners:
        owner, parts = owners.pop()
        for name, part in parts.items():
            network = getattr(part, "_orig_mod", part)  # torch.compile(network)
            if network is not part:
                setattr(owner, name, network)
            network._compiled_call_impl = None  # network.compile()
            owners.append((network, dict(network.named_children())))
    return pipeline


def _config_of(part: Any) -> Mapping[str, Any]:
    config = getattr(part, "config", {})
    return config.to_dict() if hasattr(config, "to_dict") else config


class Family(ABC):
    """Adapter between one family of diffusers pipelines and the sampler.

    Args:
        pipeline: a loaded diffusers pipeline.
        sampling: the `sampling` section of the run config.
    """

    denoiser_name: ClassVar[str]
    """Name of the network in the pipeline that LoRA is attached to: "unet" or "transformer"."""
    title: ClassVar[str]
    """The family's name in messages; needed with `schedulers`."""
    schedulers: ClassVar[tuple[str, ...]] = ()
    """Values of `sampling.scheduler` that the family can run; empty if a family does not read it."""

    def __init__(self, pipeline: Any, sampling: SamplingConfig) -> None:
        self.pipeline = uncompiled(pipeline)
        self.sampling = sampling
        if self.schedulers and sampling.scheduler not in (None, *self.schedulers):
            raise ConfigError(
                f'sampling.scheduler is "{sampling.scheduler}", which a {self.title} model does not use; remove the '
                f"key or set it to {' or '.join(self.schedulers)}."
            )
        self.check({name: _config_of(part) for name, part in pipeline.components.items() if part is not None})

    @classmethod
    def check(cls, parts: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise `ModelError` if the family cannot run a pipeline; called before its networks load, and afterwards.

        Args:
            parts: the pipeline's parts: name -> its config; empty for a part that has none.
        """
        return

    @property
    def denoiser(self) -> nn.Module:
        """The network that predicts noise or velocity, to which LoRA is attached."""
        module: nn.Module = getattr(self.pipeline, self.denoiser_name)
        return module

    @property
    @abstractmethod
    def decoder(self) -> nn.Module:
        """The network that turns latents into pixels."""

    @abstractmethod
    def scheduler(self, device: torch.device) -> Scheduler:
        """Return the pure scheduler for the configured steps."""

    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """Return (C, h, w) of one latent at the configured size."""

    @abstractmethod
    def encode(self, prompts: Sequence[str], negative_prompt: str) -> Conditioning:
        """Encode B prompts without gradient; with guidance, also the negative prompt for each of them."""

    @abstractmethod
    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the guided prediction, (B, C, h, w), for latents (B, C, h, w) at a 0-dim timestep tensor.

        Latents and prediction are in full precision; the family casts to its network's dtype and back.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels (B, 3, H, W), nominally in [0, 1] but not clipped, of latents (B, C, h, w), in their dtype."""

    def checkpoint_denoiser(self, enabled: bool) -> None:
        """Recompute the denoiser's blocks in the backward pass (on) or keep their activations (off)."""
        network: Any = self.denoiser
        if enabled:
            # No block draws random numbers in `eval()`, and a CUDA graph cannot save the state of a generator.
            network.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
        else:
            network.disable_gradient_checkpointing()
