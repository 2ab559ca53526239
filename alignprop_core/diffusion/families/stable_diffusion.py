"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet with cross attention, classifier-free guidance."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from alignprop_core.config.model import SamplingConfig
from alignprop_core.diffusion.families.base import Conditioning, Family
from alignprop_core.diffusion.families.scheduler_config import DIFFUSION, diffusion_scheduler
from alignprop_core.diffusion.schedulers import Scheduler
from alignprop_core.errors import ConfigError, ModelError

_BY_CHANNELS = {
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an image editing model (InstructPix2Pix)",
    9: "an inpainting model",
}
_PLAIN = {
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "addition_embed_type": (None, "text"),
    "encoder_hid_dim_type": (None, "text_proj"),
}
"""Settings of a UNet's further inputs, and the values with which it needs none."""


class StableDiffusion(Family):
    """diffusers' `StableDiffusionPipeline`, epsilon or v prediction.

    Follows `StableDiffusionPipeline.__call__` step by step; guidance runs negative and positive prompts in one
    call of the UNet, as the pipeline does.
    """

    denoiser_name = "unet"
    title = "Stable Diffusion"
    schedulers = DIFFUSION
    others: ClassVar[str] = ", such as Stable Diffusion XL or an upscaler"
    """Kinds of models with other inputs, for messages."""
    parts: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    """The parts that a pipeline needs; the UNet reads the text encoders' outputs side by side."""
    inputs: ClassVar[Mapping[str, tuple[str | None, ...]]] = _PLAIN
    """Settings of a UNet's further inputs, and their values in this family."""

    def __init__(self, pipeline: Any, sampling: SamplingConfig) -> None:
        super().__init__(pipeline, sampling)
        self._warned = False
        if sampling.true_cfg_scale is not None:
            raise ConfigError(
                f"sampling.true_cfg_scale is for guidance-distilled models; this is a {self.title} model, whose key is "
                "sampling.guidance_scale."
            )
        for part in self.parts:
            if part.startswith("tokenizer"):
                check_tokenizer(getattr(pipeline, part), getattr(pipeline, part.replace("tokenizer", "text_encoder")))

    @classmethod
    def check(cls, parts: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse a pipeline without all of its parts, or whose UNet needs other inputs than the family gives it.

        Inpainting, editing, upscaling and distilled models are saved with the same classes.
        """
        if missing := [part for part in cls.parts if part not in parts]:
            raise ModelError(
                f"The model has no {' and no '.join(missing)}; a {cls.title} model needs all of its parts."
            )
        unet, vae = parts["unet"], parts["vae"]
        if unet.get("time_cond_proj_dim") is not None:
            raise ModelError(
                "This UNet embeds the guidance scale (a latent consistency model); alignprop runs Stable Diffusion "
                "with classifier-free guidance. Use the base model it was distilled from."
            )
        channels, out = unet.get("in_channels", 4), unet.get("out_channels", 4)
        if channels != out:
            kind = _BY_CHANNELS.get(channels, "another kind of model")
            raise ModelError(
                f"The UNet has {channels} input channels and {out} output channels: {kind}. alignprop runs models that "
                "turn a prompt alone into an image; use the model it was made from."
            )
        if (latents := vae.get("latent_channels", 4)) != channels:
            raise ModelError(
                f"The VAE has {latents} latent channels and the UNet {channels}: they are of different models. Use the "
                f"model's own VAE, or another one with {channels} latent channels."
            )
        extra = {key: unet.get(key) for key, allowed in cls.inputs.items() if unet.get(key) not in allowed}
        if extra:
            raise ModelError(
                f"The UNet has other inputs than {cls.title} "
                f"({', '.join(f'{key}: {value}' for key, value in extra.items())}): it is of another kind of model"
                f"{cls.others}."
            )
        reads = unet.get("encoder_hid_dim") or unet.get("cross_attention_dim")
        widths = [parts[part].get("hidden_size") for part in cls.parts if part.startswith("text_encoder")]
        known = [width for width in widths if isinstance(width, int)]
        if isinstance(reads, int) and len(known) == len(widths) and sum(known) != reads:
            raise ModelError(
                f"The text encoder{'s give' if len(widths) > 1 else ' gives'} {sum(known)} numbers per token and the "
                f"UNet reads {reads}: they are of different models."
            )

    @property
    def decoder(self) -> nn.Module:
        """The VAE."""
        vae: nn.Module = self.pipeline.vae
        return vae

    def scheduler(self, device: torch.device) -> Scheduler:
        """Return the chosen scheduler, or DDIM, over the pipeline's own noise tables."""
        return diffusion_scheduler(self.pipeline.scheduler, self.sampling, device)

    def latent_shape(self) -> tuple[int, int, int]:
        """Return (C, H / f, W / f) with the VAE's factor f; the model's own size unless width and height are set."""
        unet, factor = self.pipeline.unet.config, int(self.pipeline.vae_scale_factor)
        native = unet.sample_size
        if native is None and not (self.sampling.height and self.sampling.width):
            raise ConfigError(
                "sampling.width and sampling.height must be set: the model does not say its own size (sample_size of "
                "its UNet is null)."
            )
        native_h, native_w = (native, native) if isinstance(native, int) else tuple(native or (0, 0))
        sides = []
        for name, side, own in (
            ("height", self.sampling.height, native_h * factor),
            ("width", self.sampling.width, native_w * factor),
        ):
            if side is not None and side % factor:
                raise ConfigError(f"sampling.{name} is {side}; this model needs a multiple of {factor}.")
            sides.append((side or own) // factor)
        return int(unet.in_channels), sides[0], sides[1]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], negative_prompt: str) -> Conditioning:
        """Encode with the pipeline's own `encode_prompt`; warn once about a truncated prompt."""
        self.warn_if_cut([*prompts, negative_prompt])
        guided = self.sampling.guidance_scale > 1
        positive, negative = self.pipeline.encode_prompt(
            list(prompts),
            device=self.pipeline.text_encoder.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
            negative_prompt=[negative_prompt] * len(prompts) if guided else None,
        )
        key, dtype = "encoder_hidden_states", self.pipeline.unet.dtype
        return Conditioning({key: positive.to(dtype)}, {key: negative.to(dtype)} if guided else None)

    def warn_if_cut(self, prompts: Sequence[str]) -> None:
        """Warn about the first prompt that is longer than the text encoder's limit: its end has no effect."""
        tokenizer = self.pipeline.tokenizer
        for prompt in () if self._warned else prompts:
            length = len(tokenizer(prompt, verbose=False).input_ids)
            if length > tokenizer.model_max_length:
                self._warned = True
                warnings.warn(
                    f"A prompt has {length} tokens, and the base model reads {tokenizer.model_max_length}: the end of "
                    f'long prompts has no effect (shown once). The prompt starts with "{prompt[:60]}".',
                    stacklevel=2,
                )
                return

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return uncond + scale * (cond - uncond) (Ho & Salimans 2022), or the plain prediction without guidance."""
        inputs, texts = latents.to(self.pipeline.unet.dtype), conditioning
        if conditioning.negative is not None:
            inputs = torch.cat([inputs] * 2)
            texts = Conditioning.cat(
                [Conditioning(conditioning.negative, None), Conditioning(conditioning.positive, None)]
            )
        # The UNet takes from `added_cond_kwargs` what it needs: pooled text and sizes, or nothing.
        named, hidden = texts.positive, texts.positive["encoder_hidden_states"]
        output: Tensor = self.pipeline.unet(inputs, timestep, hidden, added_cond_kwargs=named, return_dict=False)[0]
        if conditioning.negative is None:
            return output.to(latents.dtype)
        # In full precision: guidance multiplies the difference of two similar numbers.
        uncond, cond = output.to(latents.dtype).chunk(2)
        guided: Tensor = uncond + self.sampling.guidance_scale * (cond - uncond)
        return guided

    def decode(self, latents: Tensor) -> Tensor:
        """Return VAE(latents / scaling_factor) / 2 + 1/2."""
        vae: Any = self.decoder
        pixels: Tensor = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
        return pixels.to(latents.dtype) * 0.5 + 0.5


def check_tokenizer(tokenizer: Any, encoder: Any) -> None:
    """Refuse a tokenizer without its vocabulary or length: every word would be the same unknown token.

    transformers loads a folder without these files, or none at all, without an error.
    """
    words, rows = len(tokenizer), int(encoder.get_input_embeddings().num_embeddings)
    if not rows / 2 <= words <= rows:
        wrong = f"has {words} tokens and the text encoder {rows}"
        why = "Its vocabulary (vocab.json and merges.txt, or tokenizer.json) is missing or of another model"
    elif tokenizer.model_max_length > (limit := getattr(encoder.config, "max_position_embeddings", 10**6)):
        wrong = f"sets no length that the text encoder can read (model_max_length; at most {limit} tokens)"
        why = "Its tokenizer_config.json is missing or of another model"
    else:
        return
    raise ModelError(
        f"The tokenizer at {tokenizer.name_or_path} {wrong}. {why}: download the model's tokenizer folder again."
    )
