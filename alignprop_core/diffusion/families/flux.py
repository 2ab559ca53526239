"""FLUX.1: CLIP's pooled text and T5, a transformer of packed latents, flow matching, guidance as an input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignprop_core.config.model import SamplingConfig
from alignprop_core.diffusion.families.base import Conditioning
from alignprop_core.diffusion.families.flow import FlowFamily, pack, positions, unpack


class Flux(FlowFamily):
    """diffusers' `FluxPipeline`: FLUX.1 [dev], [schnell] and models made from them.

    Follows `FluxPipeline.__call__` step by step. `sampling.guidance_scale` is the scale that the network of [dev] reads
    as an input; [schnell] has no such input. `sampling.true_cfg_scale` is the scale of classifier-free guidance, with
    the negative prompt, for both; positive and negative prompts run in one call.

    Latents are (B, C, h, w), as the pipeline draws them, and packed for the transformer alone.
    """

    title = "FLUX.1"
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")
    packing = 4
    reads = (
        ("text_encoder", "hidden_size", "pooled_projection_dim", 1),
        ("text_encoder_2", "d_model", "joint_attention_dim", 1),
    )
    takes_true_cfg = True

    def __init__(self, pipeline: Any, sampling: SamplingConfig) -> None:
        super().__init__(pipeline, sampling)
        if not pipeline.transformer.config.guidance_embeds:
            self.warn_of_guidance("this FLUX.1 model was distilled to run without guidance (guidance_embeds: false)")

    @property
    def guidance(self) -> float:
        """The scale of true classifier-free guidance; 1 without."""
        return self.sampling.true_cfg_scale or 1.0

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], negative_prompt: str) -> Conditioning:
        """Encode with the pipeline's own `encode_prompt`, which logs what it cuts off a long prompt."""

        def texts(sentences: Sequence[str]) -> dict[str, Tensor]:
            hidden, pooled, _ = self.pipeline.encode_prompt(
                prompt=list(sentences), prompt_2=None, device=self.pipeline.text_encoder.device
            )
            named = {"encoder_hidden_states": hidden, "pooled_projections": pooled}
            return {name: tensor.to(self.pipeline.transformer.dtype) for name, tensor in named.items()}

        negative = texts([negative_prompt] * len(prompts)) if self.guidance > 1 else None
        return Conditioning(texts(prompts), negative)

    def velocity(self, latents: Tensor, timestep: Tensor, texts: Mapping[str, Tensor]) -> Tensor:
        """See `FlowFamily`. Positions have the network's dtype, as in the pipeline."""
        transformer, (count, _, height, width) = self.pipeline.transformer, latents.shape
        inputs = pack(latents).to(transformer.dtype)
        row, column = positions(height // 2, width // 2, latents.device)
        scale = None
        if transformer.config.guidance_embeds:
            scale = torch.full((count,), self.sampling.guidance_scale, device=latents.device, dtype=torch.float32)
        output = transformer(
            hidden_states=inputs,
            timestep=timestep.expand(count).to(inputs.dtype) / 1000,
            guidance=scale,
            txt_ids=inputs.new_zeros(texts["encoder_hidden_states"].shape[1], 3),
            img_ids=torch.stack([torch.zeros_like(row), row, column], dim=-1).to(inputs.dtype),
            **texts,
            return_dict=False,
        )[0]
        return unpack(output.to(latents.dtype), latents.shape)
