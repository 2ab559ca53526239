"""The differentiable sampler: prompts and noise to images, and a gradient at the images back to the adapters.

Three parts, so that decoder and reward never hold their activations together with the denoiser's:

    out = sampler.sample(prompts, noise)            # graph through the kept steps, ends at the final latents
    images = sampler.decode(out.latents[i:j])       # graph through the decoder, a chunk at a time
    sampler.backward(out, grad_latents)             # sends dL/dlatents on through the kept steps

`sampler(prompts, generator=g)` does it in one graph.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alignprop_core.config.model import BackpropConfig, SamplingConfig
from alignprop_core.diffusion.cpu import Forwards, doubling_forwards, effective_forwards, replaced
from alignprop_core.diffusion.families.base import Conditioning, Family
from alignprop_core.diffusion.families.find import family_for
from alignprop_core.diffusion.memory import available_bytes, graph_bytes
from alignprop_core.diffusion.noise import Noise, sample_noise, seeded
from alignprop_core.diffusion.regularization import squared_difference
from alignprop_core.diffusion.truncation import Plan, draw_plan
from alignprop_core.errors import RunError
from alignprop_core.lora import disabled

_CACHED_PROMPTS = 512
_MEMORY_SHARE = 0.6
"""Part of the free memory a graph may take before `auto` turns checkpointing on; the rest is for its backward pass."""


@dataclass(frozen=True)
class SampleOutput:
    """What sampling returns.

    Attributes:
        latents: (R, C, h, w), the end of the denoising graph. R is B, or B * (1 + n) with n LV samples: first the B
            samples, then n further sets of B.
        sample_index: R integers: which of the B prompts a row belongs to.
        kept_steps: step numbers that keep their gradient; empty if gradients are off.
        aux: scalar losses that arise while sampling, summed over the B samples; `backward` adds their gradient.
    """

    latents: Tensor
    sample_index: tuple[int, ...]
    kept_steps: tuple[int, ...]
    aux: Mapping[str, Tensor] = field(default_factory=dict)


class _StraightThroughClip(torch.autograd.Function):
    """Clip to [0, 1] forwards, identity backwards: saturated pixels can still learn."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor) -> Tensor:
        return pixels.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Sampler:
    """Samples a diffusers pipeline differentiably.

    With gradients off and the same noise the image equals the pipeline's own; the gradient equals plain autograd's
    through the same steps. Checkpointing and chunking change cost, never value.

    Args:
        pipeline: a loaded diffusers pipeline, already on its device; its networks are not changed.
        sampling: steps, guidance, eta, size.
        backprop: strategy, checkpointing.
        family: adapter for the pipeline; found by the pipeline's class if None.
        regularization: weight of the squared difference to the base model's predictions, an aux term of each sample.
    """

    def __init__(
        self,
        pipeline: Any,
        sampling: SamplingConfig | None = None,
        backprop: BackpropConfig | None = None,
        *,
        family: Family | None = None,
        regularization: float = 0.0,
    ) -> None:
        self.regularization = regularization
        self.sampling = sampling or SamplingConfig()
        self.backprop = backprop or BackpropConfig()
        self.family = family or family_for(pipeline, self.sampling)
        network: Any = self.family.denoiser
        self.device: torch.device = network.device
        weights: torch.dtype = network.dtype
        # Latents stay in float32 with half-precision networks: rounding them at every step adds up over the chain.
        self.dtype = torch.float64 if weights == torch.float64 else torch.float32
        self._half = weights if weights in (torch.float16, torch.bfloat16) else None
        # Sums of weights are exact in full precision only; they pay on CPUs.
        self._sums_weights = self.device.type == "cpu" and self._half is None
        self.scheduler = self.family.scheduler(self.device)
        self._conditionings: OrderedDict[str, Conditioning] = OrderedDict()
        self._graph_bytes: dict[str, int] = {}

    # -- randomness ---------------------------------------------------------------------------------------------

    def plan(self, *, seed: int, step: int) -> Plan:
        """Draw the cut of training step `step`; the same on every process and for every chunk of the batch."""
        return draw_plan(self.backprop, self.scheduler.steps, seeded(seed, "cut", step))

    def noise(self, *, seed: int, step: int, indices: Sequence[int]) -> Noise:
        """Draw all randomness of the samples with these global indices at training step `step`."""
        return sample_noise(
            self.family.latent_shape(),
            seed=seed,
            step=step,
            indices=indices,
            plan=self.plan(seed=seed, step=step),
            scheduler_steps=self.scheduler.steps if self.scheduler.needs_noise else 0,
            dtype=self.dtype,
        )

    # -- the three parts ----------------------------------------------------------------------------------------

    def sample(self, prompts: Sequence[str], noise: Noise) -> SampleOutput:
        """Denoise; the graph covers the kept steps and ends at the final latents.

        Args:
            prompts: B strings.
            noise: the batch's randomness, from `noise()`.
        """
        conditioning = self.conditioning(prompts)
        plan = noise.plan if torch.is_grad_enabled() else None
        checkpointing = plan is not None and self._checkpoint_steps(plan, len(prompts))
        latents = noise.initial.to(self.device, self.dtype)
        step_noise = None if noise.steps is None else noise.steps.to(self.device, self.dtype)
        state = self.scheduler.initial_state()
        forwards = self._denoiser_forwards(with_graph=plan is not None)
        regularized = plan is not None and self.regularization > 0
        with disabled(self.family.denoiser) if regularized else nullcontext():
            base_forwards = self._denoiser_forwards(with_graph=False) if regularized else {}
        penalties: list[Tensor] = []
        for i in range(self.scheduler.steps):
            in_graph = plan is not None and i >= plan.first
            keep = plan is not None and i in plan.kept
            with torch.set_grad_enabled(in_graph):
                seen = latents.detach() if plan is not None and plan.detach_input else latents
                prediction = self._predict(seen, i, conditioning, forwards, keep=keep, checkpointing=checkpointing)
                if keep and regularized:
                    base = partial(self._network, step=i, conditioning=conditioning, forwards=base_forwards)
                    penalties.append(
                        squared_difference(seen, prediction, base, partial(disabled, self.family.denoiser))
                    )
                if plan is not None and i == plan.stop_at:
                    latents = self.scheduler.clean(latents, prediction, i)
                    break
                added = None if step_noise is None else step_noise[i]
                latents, state = self.scheduler.step(latents, prediction, i, state, added)
        if plan is not None and noise.lv is not None:
            fresh = noise.lv.to(self.device, self.dtype)
            latents = self._lv_samples(latents, fresh, conditioning, forwards, checkpointing)
        copies = latents.shape[0] // len(prompts)
        return SampleOutput(
            latents=latents,
            sample_index=tuple(range(len(prompts))) * copies,
            kept_steps=() if plan is None else plan.kept,
            aux={"regularization": self.regularization * torch.stack(penalties).mean()} if penalties else {},
        )

    def predict(self, latents: Tensor, step: int, prompts: Sequence[str]) -> Tensor:
        """Return the denoiser's guided prediction, (B, C, h, w), at the start of denoising step `step`; no graph."""
        conditioning = self.conditioning(prompts)
        with torch.no_grad():
            return self._network(latents, step, conditioning, self._denoiser_forwards(with_graph=False))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode (b, C, h, w) latents into images (b, 3, H, W), float32 (float64 for a float64 model) in [0, 1]."""
        if torch.is_grad_enabled():
            self._set_decoder_checkpointing(latents)
        clipped: Tensor = _StraightThroughClip.apply(self._pixels(latents))
        return clipped

    def backward(self, out: SampleOutput, grad_latents: Tensor, *, aux_scale: float = 1.0) -> None:
        """Send a gradient at the final latents, (R, C, h, w), and aux_scale times that of the aux terms on into the
        adapters' `.grad`."""
        if not out.latents.requires_grad:
            raise RunError(
                "The sample carries no gradient: no parameter of the denoiser is trainable, or sampling ran with "
                "gradients off. Attach a LoRA first (alignprop_core.lora.attach)."
            )
        terms = list(out.aux.values())
        torch.autograd.backward(
            [out.latents, *terms], [grad_latents, *(torch.full_like(term, aux_scale) for term in terms)]
        )

    def __call__(self, prompts: Sequence[str], *, generator: torch.Generator) -> Tensor:
        """Sample and decode in one graph; the generator is used as the diffusers pipeline would use it.

        Returns:
            (R, 3, H, W) images in [0, 1].
        """
        shape = (len(prompts), *self.family.latent_shape())

        def draw() -> Tensor:
            noise: Tensor = randn_tensor(shape, generator=generator, device=self.device, dtype=self.dtype)
            return noise

        plan = self.plan(seed=generator.initial_seed(), step=0)
        initial = draw()
        steps = torch.stack([draw() for _ in range(self.scheduler.steps)]) if self.scheduler.needs_noise else None
        lv = torch.stack([draw() for _ in range(plan.lv_samples)]) if plan.lv_samples else None
        return self.decode(self.sample(prompts, Noise(initial=initial, plan=plan, steps=steps, lv=lv)).latents)

    # -- inside -------------------------------------------------------------------------------------------------

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts, each on its own and only once, so that a prompt's encoding does not depend on its batch."""
        for prompt in prompts:
            if prompt not in self._conditionings:
                self._conditionings[prompt] = self.family.encode([prompt])
            self._conditionings.move_to_end(prompt)
        batch = Conditioning.cat([self._conditionings[prompt] for prompt in prompts])
        while len(self._conditionings) > _CACHED_PROMPTS:
            self._conditionings.popitem(last=False)
        return batch

    def _autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self._half is None else torch.autocast(self.device.type, dtype=self._half)

    def _denoiser_forwards(self, *, with_graph: bool) -> Forwards:
        """Cheaper forwards of the denoiser's layers, for one batch: its adapters may change before the next."""
        if not self._sums_weights:
            return {}
        with torch.set_grad_enabled(with_graph):
            return effective_forwards(self.family.denoiser) | doubling_forwards(self.family.denoiser)

    def _network(self, latents: Tensor, step: int, conditioning: Conditioning, forwards: Forwards) -> Tensor:
        with self._autocast(), replaced(forwards):
            return self.family.predict(latents, self.scheduler.timesteps[step], conditioning).to(self.dtype)

    def _pixels(self, latents: Tensor) -> Tensor:
        forwards = doubling_forwards(self.family.decoder) if self._sums_weights else {}
        with self._autocast(), replaced(forwards):
            return self.family.decode(latents).to(self.dtype)

    def _predict(
        self,
        latents: Tensor,
        step: int,
        conditioning: Conditioning,
        forwards: Forwards,
        *,
        keep: bool,
        checkpointing: bool,
    ) -> Tensor:
        if not keep:
            # A dropped step's prediction is a constant; inside the graph only the linear path runs through it.
            with torch.no_grad():
                return self._network(latents, step, conditioning, forwards)
        if checkpointing:
            prediction: Tensor = checkpoint(
                self._network, latents, step, conditioning, forwards, use_reentrant=False, preserve_rng_state=False
            )
            return prediction
        return self._network(latents, step, conditioning, forwards)

    def _lv_samples(
        self, latents: Tensor, noise: Tensor, conditioning: Conditioning, forwards: Forwards, checkpointing: bool
    ) -> Tensor:
        """Append low-variance samples (DRaFT, Clark et al. 2024, algorithm 1): renoise one step, denoise again."""
        last = self.scheduler.steps - 1
        rows = [latents]
        for fresh in noise:
            renoised = self.scheduler.renoise(latents.detach(), last, fresh)
            prediction = self._predict(renoised, last, conditioning, forwards, keep=True, checkpointing=checkpointing)
            rows.append(self.scheduler.step(renoised, prediction, last, self.scheduler.initial_state(), None)[0])
        return torch.cat(rows)

    def _checkpoint_steps(self, plan: Plan, batch: int) -> bool:
        if self.backprop.checkpoint_steps != "auto":
            return self.backprop.checkpoint_steps
        if "step" not in self._graph_bytes:
            conditioning = next(iter(self._conditionings.values()))
            latent = torch.zeros(1, *self.family.latent_shape(), device=self.device, dtype=self.dtype)
            # With the layers' own forwards, which keep a little more.
            self._graph_bytes["step"] = graph_bytes(
                lambda: self._network(latent, 0, conditioning, {}), [self.family.denoiser]
            )
        needed = self._graph_bytes["step"] * batch * (len(plan.kept) + plan.lv_samples)
        return needed > _MEMORY_SHARE * available_bytes(self.device)

    def _set_decoder_checkpointing(self, latents: Tensor) -> None:
        wanted = self.backprop.checkpoint_decoder
        if wanted == "auto":
            if "decode" not in self._graph_bytes:
                self.family.checkpoint_decoder(False)
                latent = latents[:1].detach().requires_grad_()
                self._graph_bytes["decode"] = graph_bytes(lambda: self._pixels(latent), [self.family.decoder])
            needed = self._graph_bytes["decode"] * latents.shape[0]
            wanted = needed > _MEMORY_SHARE * available_bytes(self.device)
        self.family.checkpoint_decoder(wanted)
