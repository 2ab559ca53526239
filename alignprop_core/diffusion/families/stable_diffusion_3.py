"""Stable Diffusion 3 and 3.5: two CLIP text encoders and T5, a transformer, flow matching, classifier-free guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from alignprop_core.diffusion.families.base import Conditioning
from alignprop_core.diffusion.families.flow import FlowFamily


class StableDiffusion3(FlowFamily):
    """diffusers' `StableDiffusion3Pipeline`, with its third text encoder (T5) or without.

    Follows `StableDiffusion3Pipeline.__call__` step by step; guidance runs negative and positive prompts in one call of
    the transformer, as the pipeline does.
    """

    title = "Stable Diffusion 3"
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")
    optional = " except text_encoder_3 and tokenizer_3"
    own_sigmas = False

    @property
    def patch(self) -> int:
        """Latents for each token of the transformer, along a side."""
        return int(self.pipeline.transformer.config.patch_size)

    @property
    def side(self) -> int:
        """The model's own width and height in pixels."""
        return int(self.pipeline.transformer.config.sample_size * self.factor)

    @property
    def largest(self) -> int:
        """The largest width and height in pixels, from the table of positions."""
        return int(self.pipeline.transformer.config.pos_embed_max_size * self.factor * self.patch)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], negative_prompt: str) -> Conditioning:
        """Encode with the pipeline's own `encode_prompt`, which logs what it cuts off a long prompt."""
        guided, count = self.guidance > 1, len(prompts)
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

    def velocity(self, latents: Tensor, timestep: Tensor, texts: Mapping[str, Tensor]) -> Tensor:
        """See `FlowFamily`."""
        transformer = self.pipeline.transformer
        inputs, timesteps = latents.to(transformer.dtype), timestep.expand(len(latents))
        output: Tensor = transformer(hidden_states=inputs, timestep=timesteps, **texts, return_dict=False)[0]
        return output.to(latents.dtype)
