"""FLUX.2 [klein]: hidden states of Qwen3, a transformer of packed latents, flow matching, a VAE with statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from alignprop_core.config.model import SamplingConfig
from alignprop_core.diffusion.families.base import Conditioning
from alignprop_core.diffusion.families.flow import FlowFamily, positions
from alignprop_core.errors import ModelError


class Flux2Klein(FlowFamily):
    """diffusers' `Flux2KleinPipeline`, distilled (4 steps, no guidance) or base (classifier-free guidance).

    Follows `Flux2KleinPipeline.__call__` step by step; guidance runs negative and positive prompts in one call. The
    pipeline's negative prompt is always empty; here it is `sampling.negative_prompt`.

    Latents are (B, 4C, H / 16, W / 16), as the pipeline draws them: 2x2 patches of the VAE's (B, C, H / 8, W / 8),
    normalized by the statistics of its batch norm.
    """

    title = "FLUX.2 [klein]"
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    packing = 4
    reads = (("text_encoder", "hidden_size", "joint_attention_dim", 3),)

    def __init__(self, pipeline: Any, sampling: SamplingConfig) -> None:
        super().__init__(pipeline, sampling)
        if pipeline.config.get("is_distilled"):
            self.warn_of_guidance("this FLUX.2 model was distilled to run without guidance (is_distilled: true)")

    @classmethod
    def check(cls, parts: Mapping[str, Mapping[str, Any]]) -> None:
        """Also refuse a VAE that has no statistics of its latents."""
        super().check(parts)
        if "batch_norm_eps" not in parts["vae"]:
            raise ModelError(
                "The VAE has no statistics of its latents (batch_norm_eps): a FLUX.2 [klein] model needs an "
                "AutoencoderKLFlux2."
            )

    @property
    def guidance(self) -> float:
        """The scale of classifier-free guidance; 1 for a distilled model."""
        return 1.0 if self.pipeline.config.get("is_distilled") else self.sampling.guidance_scale

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return int(self.pipeline.transformer.config.in_channels)

    @property
    def factor(self) -> int:
        """Pixels for each latent, along a side: one latent is a patch of 2x2 of the VAE's."""
        return 2 * super().factor

    @property
    def patch(self) -> int:
        """Latents for each token of the transformer, along a side."""
        return 1

    def shift(self, tokens: int) -> float:
        """Return how much the sigmas are shifted, by the pipeline's own formula of tokens and steps."""
        return float(compute_empirical_mu(tokens, self.sampling.steps))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], negative_prompt: str) -> Conditioning:
        """Encode with the pipeline's own `encode_prompt`: 512 tokens, of which it cuts off what is beyond."""

        def texts(sentences: Sequence[str]) -> dict[str, Tensor]:
            hidden, _ = self.pipeline.encode_prompt(list(sentences), device=self.pipeline.text_encoder.device)
            return {"encoder_hidden_states": hidden.to(self.pipeline.transformer.dtype)}

        negative = texts([negative_prompt] * len(prompts)) if self.guidance > 1 else None
        return Conditioning(texts(prompts), negative)

    def velocity(self, latents: Tensor, timestep: Tensor, texts: Mapping[str, Tensor]) -> Tensor:
        """See `FlowFamily`. Positions have four axes: image, row, column, token of the prompt."""
        transformer, (count, _, height, width) = self.pipeline.transformer, latents.shape
        inputs = latents.flatten(2).transpose(1, 2).to(transformer.dtype)
        row, column = positions(height, width, latents.device)
        token = torch.arange(texts["encoder_hidden_states"].shape[1], device=latents.device)
        output: Tensor = transformer(
            hidden_states=inputs,
            timestep=timestep.expand(count).to(inputs.dtype) / 1000,
            guidance=None,
            txt_ids=torch.stack([*[torch.zeros_like(token)] * 3, token], dim=-1),
            img_ids=torch.stack([torch.zeros_like(row), row, column, torch.zeros_like(row)], dim=-1),
            **texts,
            return_dict=False,
        )[0]
        return output.to(latents.dtype).transpose(1, 2).reshape(latents.shape)

    def decode(self, latents: Tensor) -> Tensor:
        """Return VAE(the unpacked latents times the statistics' deviation plus their mean) / 2 + 1/2."""
        vae, (count, channels, height, width) = self.pipeline.vae, latents.shape
        statistics = vae.bn.running_mean, vae.bn.running_var
        mean, variance = (tensor.to(latents.dtype).view(1, -1, 1, 1) for tensor in statistics)
        patches = latents * torch.sqrt(variance + vae.config.batch_norm_eps) + mean
        squares = patches.reshape(count, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
        return self.pixels(squares.reshape(count, channels // 4, 2 * height, 2 * width))
