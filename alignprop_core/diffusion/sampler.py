"""The differentiable sampler: from prompts and noise to images, and from a gradient at the images to the adapters.

Three parts, so that activations of decoder and rewards are never in memory together with the denoiser's:

    noise = sampler.noise(prompts, seed=0, step=0)
    out = sampler.sample(prompts, noise)            # graph through the kept steps, ends at the final latents
    images = sampler.decode(out.latents[i:j])       # graph through the decoder, one chunk at a time
    sampler.backward(out, grad_latents)             # backpropagates dL/dlatents through the kept steps

`sampler(prompts, seed=0)` does all of it in one graph.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from alignprop_core.config.base import as_section
from alignprop_core.config.model import BackpropConfig, LoraConfig, ModelLora, SamplingConfig
from alignprop_core.devices import choose_device, network_dtype
from alignprop_core.diffusion.backward import DifferentiableChain
from alignprop_core.diffusion.chain import Chain
from alignprop_core.diffusion.denoiser import Batch
from alignprop_core.diffusion.engine import Engine
from alignprop_core.diffusion.families.base import Conditioning, Family
from alignprop_core.diffusion.families.find import family_for
from alignprop_core.diffusion.finite import require_finite
from alignprop_core.diffusion.loading import can_run, load_pipeline
from alignprop_core.diffusion.noise import Noise, pipeline_noise, seeded
from alignprop_core.diffusion.output import SampleOutput
from alignprop_core.diffusion.schedulers import step_sizes
from alignprop_core.diffusion.truncation import Truncation, draw_truncation
from alignprop_core.errors import RunError
from alignprop_core.images import to_pil
from alignprop_core.lora import adapters
from alignprop_core.lora.layers import adapter_names
from alignprop_core.registry.registry import Registry, default_registry

_CACHED_PROMPTS = 512

LOADED = "lora"
"""Name of the adapter that contains the finished LoRA of `Sampler.load`."""


class Sampler:
    """Samples a diffusers pipeline differentiably.

    With gradients off and the same noise the image equals the pipeline's own; the gradient equals plain autograd's
    through the same steps. Checkpointing and chunking change cost, never value.

    Args:
        pipeline: a loaded diffusers pipeline, already on its device; its networks are not changed.
        sampling: steps, guidance, eta, size.
        backprop: strategy, checkpointing.
        family: adapter for the pipeline; found by the pipeline's class if None.
        regularization: weight of the squared difference to the base model's predictions, an aux loss of each sample.

    Attributes:
        device: the denoiser's device.
        dtype: of latents and images: float64 for a float64 model, else float32.
        scheduler: the scheduler's steps as pure functions.
        step_sizes: T numbers, how far each step moves the final latents per unit of its prediction.
        latent_shape: (C, h, w) of one latent.
        engine: runs the networks.
        memory: what is recomputed, and how many samples are computed at a time.
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
        self.engine = Engine(self.family, self.backprop, self._example)
        self.memory = self.engine.memory
        self.device, self.dtype = self.engine.calls.device, self.engine.calls.dtype
        self.scheduler = self.family.scheduler(self.device)
        self.step_sizes = step_sizes(self.scheduler)
        self.latent_shape = self.family.latent_shape()
        self._encoded: OrderedDict[tuple[str, str, bool], Conditioning] = OrderedDict()
        self._lora_is_on = True

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
        frozen: Sequence[ModelLora] = (),
        device: str | torch.device = "auto",
        mixed_precision: str = "no",
        registry: Registry | None = None,
        parts: Mapping[str, str] | None = None,
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
            frozen: LoRAs that belong to the base model.
            device: auto, cpu, cuda, cuda:N or mps; ignored for a loaded pipeline.
            mixed_precision: no, fp16 or bf16; ignored for a loaded pipeline.
            registry: where registered models and families are looked up; the installed plugins if None.
            parts: parts that are not the model's own, by the keys of the `model` section: vae (a diffusers folder, a
                hub id or a .safetensors file), unet, transformer, text_encoder... (a .safetensors file).

        Raises:
            ConfigError: a key or value in `sampling` or `backprop` is wrong.
            ModelError, LoraError: the model or the LoRA cannot be loaded.
        """
        registry = registry or default_registry()
        settings = as_section(SamplingConfig, sampling, "sampling")
        truncating = as_section(BackpropConfig, backprop, "backprop")
        pipeline, families = model, [offer.spec for offer in registry.families()]
        if isinstance(model, str | Path):
            place = device if isinstance(device, torch.device) else choose_device(device)
            dtype = network_dtype(mixed_precision, place)
            pipeline = load_pipeline(
                str(model), registry=registry, device=place, dtype=dtype, families=families, parts=parts
            )
        with can_run():
            family = family_for(pipeline, settings, families)
        # Frozen LoRAs first, so that `without_lora` and regularization have them as a part of the base model.
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
        with can_run():
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

    def noise(
        self, prompts: Sequence[str], *, seed: int = 0, step: int = 0, indices: Sequence[int] | None = None
    ) -> Noise:
        """Draw all randomness of B samples, a function of (seed, step, global sample index) alone.

        Drawn on the CPU in float32, so that every device gets the same values.

        Args:
            prompts: B prompts; only their number matters.
            seed: the run's seed.
            step: the training step.
            indices: global index of each sample within the step; 0 to B - 1 if None. A process that computes a part of
                a batch passes its samples' indices.
        """
        indices = range(len(prompts)) if indices is None else indices

        def draw(purpose: str, count: int) -> Tensor:
            # One generator for each sample and purpose: the values do not depend on B, T or n.
            rows = [
                torch.randn((count, *self.latent_shape), generator=seeded(seed, purpose, step, index))
                for index in indices
            ]
            return torch.stack(rows, dim=1).to(self.dtype)  # (count, B, C, h, w)

        return Noise(
            initial=draw("initial", 1)[0],
            seed=seed,
            step=step,
            steps=draw("steps", self.scheduler.steps) if self.scheduler.needs_noise else None,
            lv=draw("lv", self.backprop.lv_samples) if self.backprop.lv_samples else None,
            indices=indices,
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
        if any(drawn is not None and drawn.requires_grad for drawn in (noise.initial, noise.steps, noise.lv)):
            raise RunError("The noise requires a gradient, and sampling has none at the noise: pass it detached.")
        conditioning = self.conditioning(prompts, negative_prompt)
        if not torch.is_grad_enabled():
            truncation = None
        elif truncation is None:
            truncation = draw_truncation(self.backprop, self.step_sizes, seed=noise.seed, step=noise.step)
        stores = False
        if truncation is not None:
            graphs = len(prompts) * (len(truncation.kept) + self.backprop.lv_samples)
            stores = graphs <= self.memory.level(len(prompts)).graphs
        chain = Chain(
            self.engine.calls,
            self.engine.denoisers,
            self.scheduler,
            conditioning,
            truncation,
            regularization=self.regularization,
            stores=stores,
            adapter_off=not self._lora_is_on,
        )
        if self.engine.pool.enabled and truncation is not None and chain.denoiser.parameters:
            self.engine.capture(chain.denoiser, len(prompts))
        if truncation is None:
            sampled = chain.run(noise)
            latents, weights, penalty = sampled.latents, sampled.weights, sampled.penalty
        else:
            latents, weights, penalty = DifferentiableChain.apply(chain, noise, *chain.denoiser.parameters)
        return SampleOutput(
            latents=latents,
            sample_index=tuple(range(len(prompts))) * (len(latents) // len(prompts)),
            sample_weights=weights,
            aux={"regularization": penalty} if chain.regularization else {},
        )

    def predict(self, latents: Tensor, step: int, prompts: Sequence[str]) -> Tensor:
        """Return the denoiser's guided prediction, (B, C, h, w), at the start of denoising step `step`; no graph."""
        conditioning = self.conditioning(prompts)
        with torch.no_grad():
            batch = Batch(conditioning, self.engine.calls.weights_of(self.family.denoiser))
            return self.engine.denoisers.of(batch).predict(latents, self.scheduler.timesteps[step])

    def decode(self, latents: Tensor) -> Tensor:
        """Decode (b, C, h, w) latents into images (b, 3, H, W), float32 (float64 for a float64 model) in [0, 1].

        Clips with a straight-through gradient (Bengio et al. 2013, https://arxiv.org/abs/1308.3432), so that saturated
        pixels can still learn.
        """
        return self.engine.decoder(latents)

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
        # One backward pass for latents and aux losses, so that their common graph is traversed (and recomputed) once.
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
            (R, 3, H, W) images in [0, 1] with their graph, R = B without LV samples; or a list of B PIL images, without
            a graph.

        Raises:
            ModelError, RunError: a PIL image cannot be generated, as `generate`.
        """
        generator = generator or torch.Generator().manual_seed(seed)
        with_graph = output == "tensor" and torch.is_grad_enabled()
        noise = pipeline_noise(
            (len(prompts), *self.latent_shape),
            generator,
            scheduler_steps=self.scheduler.steps if self.scheduler.needs_noise else 0,
            lv_samples=self.backprop.lv_samples if with_graph else 0,
            device=self.device,
            dtype=self.dtype,
        )
        if output == "pil":
            return [to_pil(image) for image in self.generate(prompts, noise)]
        with torch.set_grad_enabled(with_graph):
            return self.decode(self.sample(prompts, noise).latents)

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], noise: Noise) -> Tensor:
        """Return B images, (B, 3, H, W) in [0, 1], without a graph.

        Raises:
            ModelError: the parts of the model do not fit each other.
            RunError: an image is not finite; names network, denoising step, prompt and seed.
        """
        with can_run():
            images = self.decode(self.sample(prompts, noise).latents)
        require_finite(self, images, prompts, noise)
        return images

    # -- inside -------------------------------------------------------------------------------------------------

    def conditioning(self, prompts: Sequence[str], negative_prompt: str | None = None) -> Conditioning:
        """Encode B prompts, each alone and only once, so that a prompt's encoding does not depend on its batch.

        Args:
            prompts: B strings.
            negative_prompt: used with guidance; `sampling.negative_prompt` if None.
        """
        negative = self.sampling.negative_prompt if negative_prompt is None else negative_prompt
        # With and without the LoRA apart: it may change a text encoder.
        keys = [(prompt, negative, self._lora_is_on) for prompt in prompts]
        for key in keys:
            if key not in self._encoded:
                self._encoded[key] = self.family.encode([key[0]], negative)
            self._encoded.move_to_end(key)
        batch = Conditioning.cat([self._encoded[key] for key in keys])
        while len(self._encoded) > _CACHED_PROMPTS:
            self._encoded.popitem(last=False)
        return batch

    def _example(self, samples: int) -> tuple[Tensor, Tensor, Conditioning]:
        """Return inputs of the denoiser for so many samples, for measurements and captures."""
        latents = torch.zeros((samples, *self.latent_shape), device=self.device, dtype=self.dtype)
        return latents, self.scheduler.timesteps[0], self.conditioning([""] * samples)

    def save_lora(self, folder: str | Path, name: str = "adapter") -> None:
        """Write the trainable adapter into a folder, in diffusers' format and as NAME.safetensors in kohya's layout."""
        adapters.save(self.family.denoiser, Path(folder), name=name, component=self.family.denoiser_name)
