"""Z-Image: hidden states of Qwen3, one transformer for tokens of image and prompt, flow matching, a VAE."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from torch import Tensor, nn
from torch.nn.functional import pad

from alignprop_core.config.model import SamplingConfig
from alignprop_core.diffusion.families.base import Conditioning
from alignprop_core.diffusion.families.flow import FlowFamily, positions
from alignprop_core.errors import ModelError

TOKENS = 512
"""Tokens of a prompt that the pipeline reads, and to which prompts are padded here."""


class ZImage(FlowFamily):
    """diffusers' `ZImagePipeline`: Z-Image and Z-Image-Turbo.

    Follows `ZImagePipeline.__call__` step by step, without its normalization and truncation of guidance, which are off
    by default. As in the pipeline, `sampling.guidance_scale` multiplies what is added to the positive prediction:
    cond + scale * (cond - uncond); 1 is off, for which the pipeline has 0.

    The transformer's own `forward` takes a list with the tokens of each prompt, so that its shapes depend on the
    prompts. Here its layers run on prompts padded to `TOKENS`, and no token attends to the padding: results are the
    same, and one CUDA graph serves all prompts.
    """

    title = "Z-Image"
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    reads = (("text_encoder", "hidden_size", "cap_feat_dim", 1),)

    def __init__(self, pipeline: Any, sampling: SamplingConfig) -> None:
        super().__init__(pipeline, sampling)
        name = Path(str(pipeline.config.get("_name_or_path") or "")).name
        if "turbo" in name.lower() and self.guidance > 1:
            warnings.warn(
                f"sampling.guidance_scale is {sampling.guidance_scale:g}, but {name} was distilled to run without "
                "guidance, and its images get worse with it; set it to 1.",
                stacklevel=2,
            )

    @classmethod
    def check(cls, parts: Mapping[str, Mapping[str, Any]]) -> None:
        """Also refuse a transformer that has no layers for patches of 2x2."""
        super().check(parts)
        network = parts["transformer"]
        sizes = zip(network.get("all_patch_size", (2,)), network.get("all_f_patch_size", (1,)), strict=False)
        if (2, 1) not in list(sizes):
            raise ModelError("The transformer has no layers for patches of 2x2 latents (all_patch_size has no 2).")

    @property
    def guidance(self) -> float:
        """The scale in uncond + scale * (cond - uncond), one more than the pipeline's; 1 without guidance."""
        return self.sampling.guidance_scale + 1 if self.sampling.guidance_scale > 1 else 1.0

    @property
    def largest(self) -> int:
        """The largest width and height in pixels, from the table of positions."""
        return int(min(self.pipeline.transformer.config.axes_lens[1:]) * self.factor * self.patch)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], negative_prompt: str) -> Conditioning:
        """Encode with the pipeline's own `encode_prompt`: 512 tokens, of which it cuts off what is beyond."""
        guided, network = self.guidance > 1, self.pipeline.transformer
        positive, negative = self.pipeline.encode_prompt(
            list(prompts),
            device=self.pipeline.text_encoder.device,
            do_classifier_free_guidance=guided,
            negative_prompt=[negative_prompt] * len(prompts),
            max_sequence_length=TOKENS,
        )

        def tensors(texts: Sequence[Tensor]) -> dict[str, Tensor]:
            padded = torch.stack([pad(text, (0, 0, 0, TOKENS - len(text))) for text in texts])
            counts = torch.tensor([len(text) for text in texts], device=padded.device)
            return {"features": padded.to(network.dtype), "counts": counts}

        return Conditioning(tensors(positive), tensors(negative) if guided else None)

    def velocity(self, latents: Tensor, timestep: Tensor, texts: Mapping[str, Tensor]) -> Tensor:
        """See `FlowFamily`. The order of tokens is the transformer's own: image, its padding, prompt, its padding."""
        network = self.pipeline.transformer
        n, channels, height, width = latents.shape
        rows, columns = height // 2, width // 2
        patches = latents.to(network.dtype).reshape(n, channels, rows, 2, columns, 2).permute(0, 2, 4, 3, 5, 1)
        time = network.t_embedder((1000 - timestep.expand(n)) / 1000 * network.t_scale).to(network.dtype)

        # A prompt's length is rounded up with a learned token, which other tokens attend to, unlike the padding.
        place = torch.arange(TOKENS, device=latents.device)
        rounded = (texts["counts"] + SEQ_MULTI_OF - 1) // SEQ_MULTI_OF * SEQ_MULTI_OF
        seen = place < rounded[:, None]
        prompt = network.cap_embedder(texts["features"])
        prompt = torch.where((place < texts["counts"][:, None])[..., None], prompt, network.cap_pad_token)
        nowhere = torch.zeros_like(place)
        prompt_rotation = self._rotation(torch.stack([place + 1, nowhere, nowhere], dim=-1).expand(n, -1, -1))

        image = network.all_x_embedder["2-1"](patches.reshape(n, rows * columns, 4 * channels))
        missing = -rows * columns % SEQ_MULTI_OF
        image = torch.cat([image, network.x_pad_token.expand(n, missing, -1)], dim=1)
        row, column = positions(rows, columns, latents.device)
        after = (rounded + 1)[:, None].expand(-1, rows * columns)  # an image comes after its prompt
        ids = torch.stack([after, row.expand(n, -1), column.expand(n, -1)], dim=-1)
        image_rotation = self._rotation(pad(ids, (0, 0, 0, missing)))

        image = self._run(network.noise_refiner, image, None, image_rotation, time)
        prompt = self._run(network.context_refiner, prompt, seen, prompt_rotation)
        mask = torch.cat([seen.new_ones(n, image.shape[1]), seen], dim=1)
        rotation = torch.cat([image_rotation, prompt_rotation], dim=1)
        tokens = self._run(network.layers, torch.cat([image, prompt], dim=1), mask, rotation, time)
        output = network.all_final_layer["2-1"](tokens, c=time)[:, : rows * columns]
        squares: Tensor = output.reshape(n, rows, columns, 2, 2, channels).permute(0, 5, 1, 3, 2, 4)
        # The network predicts clean - noise.
        return -squares.reshape(latents.shape).to(latents.dtype)

    def _rotation(self, ids: Tensor) -> Tensor:
        """Return the complex rotations (n, tokens, half of a head) of positions (n, tokens, 3)."""
        rotation: Tensor = self.pipeline.transformer.rope_embedder(ids.flatten(0, 1))
        return rotation.view(*ids.shape[:2], -1)

    def _run(self, layers: nn.ModuleList, tokens: Tensor, *inputs: Tensor | None) -> Tensor:
        """Run the blocks, recomputed in the backward pass where the network is set so."""
        network = self.pipeline.transformer
        for layer in layers:
            if torch.is_grad_enabled() and network.gradient_checkpointing:
                tokens = network._gradient_checkpointing_func(layer, tokens, *inputs)
            else:
                tokens = layer(tokens, *inputs)
        return tokens
