"""Stable Diffusion 3 and 3.5: two CLIP text encoders and T5, a transformer, flow matching, classifier-free guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alignprop_core.config.model import SamplingConfig
from alignprop_core.diffusion.families.base import Conditioning, Family
from alignprop_core.diffusion.schedulers import FlowMatchEuler, Scheduler
from alignprop_core.errors import ConfigError, ModelError

_PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")


class StableDiffusion3(Family):
    """diffusers' `StableDiffusion3Pipeline`, with its third text encoder (T5) or without.

    Follows `StableDiffusion3Pipeline.__call__` step by step; guidance runs negative and positive prompts in one call of
    the transformer, as the pipeline does.
    """

    denoiser_name = "transformer"
    title = "Stable Diffusion 3"
    schedulers = ("flow_match_euler",)

    def __init__(self, pipeline: Any, sampling: SamplingConfig) -> None:
        super().__init__(pipeline, sampling)
        if sampling.true_cfg_scale is not None:
            raise ConfigError(
                "sampling.true_cfg_scale is for guidance-distilled models; this is a Stable Diffusion 3 model, whose "
                "key is sampling.guidance_scale."
            )
        if sampling.eta:
            raise ConfigError(f"sampling.eta is {sampling.eta:g}, but only DDIM has it; this model uses flow matching.")

    @classmethod
    def check(cls, parts: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse a pipeline without all of its parts, of which only T5 may be missing, or of parts that do not fit."""
        if missing := [part for part in _PARTS if part not in parts]:
            raise ModelError(
                f"The model has no {' and no '.join(missing)}; a Stable Diffusion 3 model needs all of its parts "
                "except text_encoder_3 and tokenizer_3."
            )
        channels = parts["transformer"].get("in_channels", 16)
        if (latents := parts["vae"].get("latent_channels", 16)) != channels:
            raise ModelError(
                f"The VAE has {latents} latent channels and the transformer {channels}: they are of different models. "
                f"Use the model's own VAE, or another one with {channels} latent channels."
            )
        if "prediction_type" in parts["scheduler"] or "beta_schedule" in parts["scheduler"]:
            raise ModelError(
                "The model's scheduler is for diffusion (it has betas or a prediction_type); a Stable Diffusion 3 "
                "model needs one for flow matching, FlowMatchEulerDiscreteScheduler."
            )

    @property
    def decoder(self) -> nn.Module:
        """The VAE."""
        vae: nn.Module = self.pipeline.vae
        return vae

    def scheduler(self, device: torch.device) -> Scheduler:
        """Return Euler's method over the pipeline's own sigmas, shifted for the image's size if the model is set so."""
        config, mu = self.pipeline.scheduler.config, None
        if config.get("use_dynamic_shifting"):
            _, rows, columns = self.latent_shape()
            patches = rows * columns // self.pipeline.transformer.config.patch_size**2
            # A straight line through two points: (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift).
            few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.16)
            slope = (high - low) / (many - few)
            mu = patches * slope + (low - slope * few)
        return FlowMatchEuler(config, self.sampling.steps, mu=mu, device=device)

    def latent_shape(self) -> tuple[int, int, int]:
        """Return (C, H / f, W / f) with the VAE's factor f; the model's own size unless width and height are set."""
        network, factor = self.pipeline.transformer.config, int(self.pipeline.vae_scale_factor)
        sides, needed = [], factor * int(network.patch_size)
        largest = network.pos_embed_max_size * needed
        for name, side in (("height", self.sampling.height), ("width", self.sampling.width)):
            side = side or network.sample_size * factor
            if side % needed or side > largest:
                raise ConfigError(
                    f"sampling.{name} is {side}; this model needs a multiple of {needed}, at most {largest}."
                )
            sides.append(side // factor)
        return int(network.in_channels), sides[0], sides[1]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], negative_prompt: str) -> Conditioning:
        """Encode with the pipeline's own `encode_prompt`, which logs what it cuts off a long prompt."""
        guided, count = self.sampling.guidance_scale > 1, len(prompts)
        positive, negative, pooled, negative_pooled = self.pipeline.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            device=self.pipeline.text_encoder.device,
            do_classifier_free_guidance=guided,
            negative_prompt=[negative_prompt] * count if guided else None,
        )

        def tensors(hidden: Tensor, text: Tensor) -> dict[str, Tensor]:
            named = {"encoder_hidden_states": hidden, "pooled_projections": text}
            return {name: tensor.to(self.pipeline.transformer.dtype) for name, tensor in named.items()}

        return Conditioning(tensors(positive, pooled), tensors(negative, negative_pooled) if guided else None)

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return uncond + scale * (cond - uncond) (Ho & Salimans 2022), or the plain prediction without guidance."""
        transformer, inputs = self.pipeline.transformer, latents.to(self.pipeline.transformer.dtype)
        texts = conditioning
        if conditioning.negative is not None:
            inputs = torch.cat([inputs] * 2)
            texts = Conditioning.cat(
                [Conditioning(conditioning.negative, None), Conditioning(conditioning.positive, None)]
            )
        output = transformer(
            hidden_states=inputs, timestep=timestep.expand(len(inputs)), **texts.positive, return_dict=False
        )[0].to(latents.dtype)
        if conditioning.negative is None:
            return output  # type: ignore[no-any-return]
        # In full precision: guidance multiplies the difference of two similar numbers.
        uncond, cond = output.chunk(2)
        guided: Tensor = uncond + self.sampling.guidance_scale * (cond - uncond)
        return guided

    def decode(self, latents: Tensor) -> Tensor:
        """Return VAE(latents / scaling_factor + shift_factor) / 2 + 1/2."""
        vae = self.pipeline.vae
        unscaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        pixels: Tensor = vae.decode(unscaled.to(vae.dtype), return_dict=False)[0]
        return pixels.to(latents.dtype) * 0.5 + 0.5
