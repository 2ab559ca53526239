"""The differentiable sampler: from prompts and noise to images, and from a gradient at the images to the adapters.

Three parts, so that decoder and rewards never hold their activations together with the denoiser's:

    noise = sampler.noise(prompts, seed=0, step=0)
    out = sampler.sample(prompts, noise)            # graph through the kept steps, ends at the final latents
    images = sampler.decode(out.latents[i:j])       # graph through the decoder, one chunk at a time
    sampler.backward(out, grad_latents)             # backpropagates dL/dlatents through the kept steps

`sampler(prompts, seed=0)` does all of it in one graph.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alignprop_core.config.base import as_section
from alignprop_core.config.model import BackpropConfig, LoraConfig, ModelLora, SamplingConfig
from alignprop_core.devices import choose_device, network_dtype
from alignprop_core.diffusion.cpu import Forwards, doubling_forwards, effective_forwards, replaced
from alignprop_core.diffusion.families.base import Conditioning, Family
from alignprop_core.diffusion.families.find import family_for
from alignprop_core.diffusion.loading import load_pipeline
from alignprop_core.diffusion.memory import available_bytes, graph_bytes
from alignprop_core.diffusion.noise import Noise, sample_noise, seeded
from alignprop_core.diffusion.regularization import squared_difference
from alignprop_core.diffusion.truncation import Truncation, draw_truncation
from alignprop_core.errors import RunError
from alignprop_core.images import to_pil
from alignprop_core.lora import adapters
from alignprop_core.lora.layers import adapter_names
from alignprop_core.registry.registry import Registry, default_registry

LOADED = "lora"
"""Name of the adapter that holds the finished LoRA of `Sampler.load`."""

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
        sample_weights: (R,), the weight of a row within its sample; they add up to 1 for each of the B prompts.
        aux: scalar losses that arise while sampling, summed over the B samples; `backward` adds their gradient.
    """

    latents: Tensor
    sample_index: tuple[int, ...]
    sample_weights: Tensor
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
        self._conditionings: OrderedDict[tuple[str, str, bool], Conditioning] = OrderedDict()
        self._lora_is_on = True
        self._graph_bytes: dict[str, int] = {}

    @classmethod
    def load(
        cls,
        model: Any = "starter",
        *,
        rank: int | None = None,
        adapter: LoraConfig | None = None,
        seed: int = 0,
        lora: str | Path | None = None,
        strength: float = 1.0,
        sampling: SamplingConfig | Mapping[str, Any] | None = None,
        backprop: BackpropConfig | Mapping[str, Any] | None = None,
        regularization: float = 0.0,
        vae: str | None = None,
        frozen: Sequence[ModelLora] = (),
        device: str | torch.device = "auto",
        mixed_precision: str = "no",
        registry: Registry | None = None,
    ) -> Sampler:
        """Load a model, attach a trainable adapter or a finished LoRA, and return its sampler.

        Args:
            model: a registered model, a hub id, a diffusers folder, a .safetensors file, or a loaded pipeline.
            rank: attach a trainable adapter of this rank; short for `adapter=LoraConfig(rank=rank)`.
            adapter: attach a trainable adapter with these settings.
            seed: decides the adapter's initial values.
            lora: apply a LoRA (a file, a LoRA folder or a run folder), frozen.
            strength: factor on the weight change of `lora`.
            sampling: steps, guidance, size; keys of the `sampling` section.
            backprop: strategy, checkpointing; keys of the `backprop` section.
            regularization: weight of the squared difference to the base model's predictions.
            vae: another autoencoder: a diffusers folder or a hub id.
            frozen: LoRAs that belong to the base model.
            device: auto, cpu, cuda, cuda:N or mps; ignored for a loaded pipeline.
            mixed_precision: no, fp16 or bf16; ignored for a loaded pipeline.
            registry: where registered models and families are looked up; the installed plugins if None.

        Raises:
            ConfigError: a key or value in `sampling` or `backprop` is wrong.
            ModelError, LoraError: the model or the LoRA cannot be loaded.
        """
        registry = registry or default_registry()
        settings = as_section(SamplingConfig, sampling, "sampling")
        truncating = as_section(BackpropConfig, backprop, "backprop")
        pipeline = model
        if isinstance(model, str | Path):
            place = device if isinstance(device, torch.device) else choose_device(device)
            dtype = network_dtype(mixed_precision, place)
            pipeline = load_pipeline(str(model), registry=registry, device=place, dtype=dtype, vae=vae)
        family = family_for(pipeline, settings, [offer.spec for offer in registry.families()])
        for number, extra in enumerate(frozen):
            adapters.attach_frozen(pipeline, extra.path, extra.strength, f"frozen_{number}")
        if lora is not None:
            adapters.attach_frozen(pipeline, lora, strength, LOADED)
        adapter = LoraConfig(rank=rank) if rank is not None else adapter
        if adapter is not None:
            adapters.attach(
                family.denoiser,
                rank=adapter.rank,
                alpha=adapter.alpha,
                target_modules=adapter.target_modules,
                use_rslora=adapter.use_rslora,
                init_from=adapter.init_from,
                seed=seed,
            )
        return cls(pipeline, settings, truncating, family=family, regularization=regularization)

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters of the trainable adapter: A and B of each layer, in module order."""
        return adapters.parameters(self.family.denoiser)

    @contextmanager
    def without_lora(self) -> Iterator[None]:
        """Switch the trainable adapter and the LoRA of `load` off inside the block; the base model's own stay on."""
        parts = [part for part in self.family.pipeline.components.values() if isinstance(part, torch.nn.Module)]
        before, self._lora_is_on = self._lora_is_on, False
        try:
            with ExitStack() as stack:
                for part in parts:
                    for name in adapter_names(part) & {adapters.ADAPTER, LOADED}:
                        stack.enter_context(adapters.disabled(part, name=name))
                yield
        finally:
            self._lora_is_on = before

    # -- randomness ---------------------------------------------------------------------------------------------

    def truncation(self, *, seed: int, step: int) -> Truncation:
        """Draw the truncation of training step `step`; the same on every process and for every chunk of the batch."""
        return draw_truncation(self.backprop, self.scheduler.steps, seeded(seed, "cut", step))

    def noise(
        self, prompts: Sequence[str], *, seed: int = 0, step: int = 0, indices: Sequence[int] | None = None
    ) -> Noise:
        """Draw all randomness of B samples.

        Args:
            prompts: B prompts; only their number matters.
            seed: the run's seed.
            step: the training step.
            indices: global index of each sample within the step; 0 to B - 1 if None. A process that computes a part of
                a batch passes its samples' indices.
        """
        return sample_noise(
            self.family.latent_shape(),
            seed=seed,
            step=step,
            indices=range(len(prompts)) if indices is None else indices,
            scheduler_steps=self.scheduler.steps if self.scheduler.needs_noise else 0,
            lv_samples=self.backprop.lv_samples,
            dtype=self.dtype,
        )

    # -- the three parts ----------------------------------------------------------------------------------------

    def sample(
        self,
        prompts: Sequence[str],
        noise: Noise,
        truncation: Truncation | None = None,
        *,
        negative_prompt: str | None = None,
    ) -> SampleOutput:
        """Denoise; the graph covers the kept steps and ends at the final latents.

        Args:
            prompts: B strings.
            noise: the batch's randomness, from `noise()`.
            truncation: the steps that keep their gradient; drawn from the noise's seed and step if None. With gradients
                off there are none.
            negative_prompt: for these samples; `sampling.negative_prompt` if None.
        """
        conditioning = self.conditioning(prompts, negative_prompt)
        plan = (truncation or self.truncation(seed=noise.seed, step=noise.step)) if torch.is_grad_enabled() else None
        checkpointing = plan is not None and self._checkpoint_steps(plan, len(prompts))
        latents = noise.initial.to(self.device, self.dtype)
        step_noise = None if noise.steps is None else noise.steps.to(self.device, self.dtype)
        state = self.scheduler.initial_state()
        forwards = self._denoiser_forwards(with_graph=plan is not None)
        regularized = plan is not None and self.regularization > 0
        with adapters.disabled(self.family.denoiser) if regularized else nullcontext():
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
                        squared_difference(seen, prediction, base, partial(adapters.disabled, self.family.denoiser))
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
            sample_weights=latents.new_full((latents.shape[0],), 1 / copies),
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
        """Backpropagate through the kept steps into the adapters' `.grad`.

        Args:
            out: what `sample` returned.
            grad_latents: dL/dlatents, (R, C, h, w).
            aux_scale: factor on the gradient of the aux losses.
        """
        if not out.latents.requires_grad:
            raise RunError(
                "The sample carries no gradient: no parameter of the denoiser is trainable, or sampling ran with "
                "gradients off. Load the sampler with a trainable adapter: Sampler.load(model, rank=8)."
            )
        terms = list(out.aux.values())
        torch.autograd.backward(
            [out.latents, *terms], [grad_latents, *(torch.full_like(term, aux_scale) for term in terms)]
        )

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        generator: torch.Generator | None = None,
        output: Literal["tensor", "pil"] = "tensor",
    ) -> Any:
        """Sample and decode in one graph, with the noise that the diffusers pipeline draws from the same generator.

        Args:
            prompts: B strings.
            seed: seed of the generator; also of the truncation.
            generator: the generator itself, instead of a seed.
            output: "tensor" or "pil".

        Returns:
            (R, 3, H, W) images in [0, 1] with their graph, R = B but for LV samples; or a list of B PIL images, without
            a graph.
        """
        generator = generator or torch.Generator().manual_seed(seed)
        shape = (len(prompts), *self.family.latent_shape())

        def draw(count: int) -> Tensor:
            drawn = [
                randn_tensor(shape, generator=generator, device=self.device, dtype=self.dtype) for _ in range(count)
            ]
            return torch.stack(drawn)

        initial = draw(1)[0]
        with_graph = output == "tensor" and torch.is_grad_enabled()
        noise = Noise(
            initial=initial,
            seed=generator.initial_seed(),
            steps=draw(self.scheduler.steps) if self.scheduler.needs_noise else None,
            lv=draw(self.backprop.lv_samples) if with_graph and self.backprop.lv_samples else None,
        )
        with torch.set_grad_enabled(with_graph):
            images = self.decode(self.sample(prompts, noise).latents)
        return images if output == "tensor" else [to_pil(image) for image in images]

    # -- inside -------------------------------------------------------------------------------------------------

    def conditioning(self, prompts: Sequence[str], negative_prompt: str | None = None) -> Conditioning:
        """Encode prompts, each on its own and only once, so that a prompt's encoding does not depend on its batch."""
        negative = self.sampling.negative_prompt if negative_prompt is None else negative_prompt
        keys = [(prompt, negative, self._lora_is_on) for prompt in prompts]
        for key in keys:
            if key not in self._conditionings:
                self._conditionings[key] = self.family.encode([key[0]], negative)
            self._conditionings.move_to_end(key)
        batch = Conditioning.cat([self._conditionings[key] for key in keys])
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

    def _checkpoint_steps(self, plan: Truncation, batch: int) -> bool:
        if self.backprop.checkpoint_steps != "auto":
            return self.backprop.checkpoint_steps
        if "step" not in self._graph_bytes:
            conditioning = next(iter(self._conditionings.values()))
            latent = torch.zeros(1, *self.family.latent_shape(), device=self.device, dtype=self.dtype)
            # With the layers' own forwards, which keep a little more.
            self._graph_bytes["step"] = graph_bytes(
                lambda: self._network(latent, 0, conditioning, {}), [self.family.denoiser]
            )
        needed = self._graph_bytes["step"] * batch * (len(plan.kept) + self.backprop.lv_samples)
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
