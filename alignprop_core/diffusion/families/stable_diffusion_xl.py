"""Stable Diffusion XL: two CLIP text encoders, a UNet that also reads pooled text and the image's size."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alignprop_core.config.model import SamplingConfig
from alignprop_core.diffusion.families.base import Conditioning
from alignprop_core.diffusion.families.stable_diffusion import StableDiffusion

_INPUTS = {
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "addition_embed_type": ("text_time",),
    "encoder_hid_dim_type": (None,),
}


class StableDiffusionXL(StableDiffusion):
    """diffusers' `StableDiffusionXLPipeline`, epsilon or v prediction, any aspect ratio.

    Follows `StableDiffusionXLPipeline.__call__` step by step, with its default size conditions: the original and the
    target size are the image's, and nothing is cropped.
    """

    title = "Stable Diffusion XL"
    others = ", such as Stable Diffusion 1 or the refiner"
    parts = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    inputs = _INPUTS

    def __init__(self, pipeline: Any, sampling: SamplingConfig) -> None:
        super().__init__(pipeline, sampling)
        self._float32_vae: nn.Module | None = None
        if pipeline.vae.dtype == torch.float16 and pipeline.vae.config.get("force_upcast"):
            # This VAE overflows in float16, and the pipeline decodes in float32. A copy, because a pipeline whose VAE
            # is in float32 already would pass it float16 latents.
            self._float32_vae = copy.deepcopy(pipeline.vae).float()

    @property
    def decoder(self) -> nn.Module:
        """The VAE, in float32 where the pipeline decodes in float32."""
        return super().decoder if self._float32_vae is None else self._float32_vae

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], negative_prompt: str) -> Conditioning:
        """Encode with the pipeline's own `encode_prompt`; warn once about a truncated prompt.

        An empty negative prompt is encoded as the pipeline encodes a missing one: by zeros, if the model is set so.
        """
        self.warn_if_cut([*prompts, negative_prompt])
        guided = self.sampling.guidance_scale > 1
        positive, negative, pooled, negative_pooled = self.pipeline.encode_prompt(
            list(prompts),
            device=self.pipeline.text_encoder.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
            negative_prompt=[negative_prompt] * len(prompts) if guided and negative_prompt else None,
        )
        _, rows, columns = self.latent_shape()
        size = rows * self.pipeline.vae_scale_factor, columns * self.pipeline.vae_scale_factor
        # Original size, offset of the crop, target size.
        time_ids = positive.new_tensor([*size, 0, 0, *size]).repeat(len(prompts), 1)

        def tensors(hidden: Tensor, text: Tensor) -> dict[str, Tensor]:
            named = {"encoder_hidden_states": hidden, "text_embeds": text, "time_ids": time_ids}
            return {name: tensor.to(self.pipeline.unet.dtype) for name, tensor in named.items()}

        return Conditioning(tensors(positive, pooled), tensors(negative, negative_pooled) if guided else None)

    def decode(self, latents: Tensor) -> Tensor:
        """Return VAE(latents / scaling_factor) / 2 + 1/2; denormalized first, if the VAE has statistics of latents."""
        config = self.pipeline.vae.config
        if config.get("latents_mean") is None or config.get("latents_std") is None:
            return super().decode(latents)
        mean, std = (latents.new_tensor(config[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
        # The base class divides by the scaling factor.
        return super().decode(latents * std + mean * config.scaling_factor)
