"""Tiny diffusers pipelines with random seeded weights, one per family: 32x32 pixels, offline, fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from alignprop_core.testing.tiny_networks import (
    DDIM,
    FLUX2_TRANSFORMER,
    FLUX_TRANSFORMER,
    NO_QUANT,
    QWEN,
    SD3_TRANSFORMER,
    SD_UNET,
    SDXL_UNET,
    VAE,
    Z_IMAGE_TRANSFORMER,
)

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def _bytes() -> list[str]:
    """Return the symbols of byte-level tokenizers, one for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)  # each remaining byte is the next character after 255
    return [chr(code) for code in printable] + [chr(256 + n) for n in range(others)]


def tiny_tokenizer() -> CLIPTokenizer:
    """Return a CLIP tokenizer on bytes: 512 symbols and the two special tokens, no merges."""
    letters = _bytes()
    symbols = [*letters, *(letter + "</w>" for letter in letters), BOS, EOS]
    # transformers 5 silently ignores vocab_file= and merges_file=.
    return CLIPTokenizer(vocab={symbol: n for n, symbol in enumerate(symbols)}, merges=[], model_max_length=77)


def tiny_t5_tokenizer() -> T5Tokenizer:
    """Return a T5 tokenizer on the letters of ASCII: 98 symbols."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *(chr(code) for code in range(ord("!"), ord("~") + 1))]
    return T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0, model_max_length=512)


def tiny_qwen_tokenizer() -> Qwen2Tokenizer:
    """Return a Qwen tokenizer on bytes with a chat template: 256 symbols and three special tokens, no merges."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    symbols = {symbol: n for n, symbol in enumerate([*_bytes(), *special])}
    tokenizer = Qwen2Tokenizer(vocab=symbols, merges=[], additional_special_tokens=special[1:], model_max_length=512)
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def tiny_vae(latent_channels: int, kind: Any = AutoencoderKL, **more: Any) -> Any:
    """Return a VAE for 32x32 pixels that takes the global random state; `more` is options of its class."""
    return kind(**VAE, latent_channels=latent_channels, **more)


def tiny_sd(
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon", cross_attention_dim: int = 32, seed: int = 0
) -> StableDiffusionPipeline:
    """Return a Stable Diffusion pipeline of about 0.3M float32 parameters; the same `seed` gives the same weights.

    Images are 32x32, latents (B, 4, 4, 4). The global random state is unchanged.
    """
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=cross_attention_dim,
                intermediate_size=2 * cross_attention_dim,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=77,
                # Without these the pooled output of a small vocabulary comes from position 0.
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        vae = tiny_vae(4)
        unet = UNet2DConditionModel(**SD_UNET, cross_attention_dim=cross_attention_dim)
    scheduler = DDIMScheduler(**DDIM, prediction_type=prediction_type)
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_sdxl(prediction_type: Literal["epsilon", "v_prediction"] = "epsilon", seed: int = 0) -> Any:
    """Return a Stable Diffusion XL pipeline of about 0.4M float32 parameters; the same `seed` gives the same weights.

    Images are 32x32, latents (B, 4, 4, 4). The global random state is unchanged.
    """
    base = tiny_sd(prediction_type, seed=seed)
    config = base.text_encoder.config.to_dict() | {"projection_dim": 24}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config)).eval()
        unet = UNet2DConditionModel(**SDXL_UNET).eval()
    pipeline = StableDiffusionXLPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=base.tokenizer,
        tokenizer_2=tiny_tokenizer(),
        unet=unet,
        scheduler=base.scheduler,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_sd3(seed: int = 0) -> Any:
    """Return a Stable Diffusion 3 pipeline without T5, of about 0.1M float32 parameters; `seed` decides the weights.

    Images are 32x32, latents (B, 16, 4, 4). The global random state is unchanged.
    """
    base = tiny_sd(seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        config = CLIPTextConfig.from_dict(base.text_encoder.config.to_dict() | {"projection_dim": 16})
        encoders = [CLIPTextModelWithProjection(config).eval() for _ in range(2)]
        vae = tiny_vae(16, scaling_factor=1.5305, shift_factor=0.0609, **NO_QUANT).eval()
        transformer = SD3Transformer2DModel(**SD3_TRANSFORMER).eval()
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=base.tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_flux(guidance_embeds: bool = True, seed: int = 0) -> Any:
    """Return a FLUX.1 pipeline of about 0.1M float32 parameters: [dev], or [schnell] without `guidance_embeds`.

    Images are 32x32, latents (B, 16, 4, 4). The global random state is unchanged.
    """
    base = tiny_sd(seed=seed)
    tokenizer_2 = tiny_t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        text_encoder_2 = T5EncoderModel(
            T5Config(vocab_size=len(tokenizer_2), d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ).eval()
        vae = tiny_vae(16, scaling_factor=0.3611, shift_factor=0.1159, **NO_QUANT).eval()
        transformer = FluxTransformer2DModel(**FLUX_TRANSFORMER, guidance_embeds=guidance_embeds).eval()
    pipeline = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance_embeds),
        vae=vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    )
    pipeline.default_sample_size = 4  # not saved with the pipeline, which says 128
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _tiny_qwen(kind: Any, tokenizer: Qwen2Tokenizer, layers: int) -> Any:
    return kind(
        Qwen3Config(**QWEN, vocab_size=len(tokenizer), num_hidden_layers=layers, pad_token_id=tokenizer.pad_token_id)
    ).eval()


def tiny_flux2_klein(distilled: bool = False, seed: int = 0) -> Any:
    """Return a FLUX.2 [klein] pipeline of about 0.1M float32 parameters, distilled or base; `seed` decides the weights.

    Images are 32x32, latents (B, 32, 2, 2). The global random state is unchanged.
    """
    tokenizer = tiny_qwen_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = _tiny_qwen(Qwen3ForCausalLM, tokenizer, layers=28)  # the pipeline reads the 27th
        vae = tiny_vae(8, AutoencoderKLFlux2).eval()
        vae.bn.running_mean.normal_().mul_(0.5)
        vae.bn.running_var.uniform_(0.5, 2.0)
        transformer = Flux2Transformer2DModel(**FLUX2_TRANSFORMER).eval()
    pipeline = Flux2KleinPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        is_distilled=distilled,
    )
    pipeline.default_sample_size = 4  # not saved with the pipeline, which says 128
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_z_image(seed: int = 0) -> Any:
    """Return a Z-Image pipeline of about 0.3M float32 parameters; the same `seed` gives the same weights.

    Images are 32x32, latents (B, 16, 4, 4). The global random state is unchanged.
    """
    tokenizer = tiny_qwen_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = _tiny_qwen(Qwen3Model, tokenizer, layers=2)
        vae = tiny_vae(16, scaling_factor=0.3611, shift_factor=0.1159, **NO_QUANT).eval()
        transformer = ZImageTransformer2DModel(**Z_IMAGE_TRANSFORMER).eval()
        with torch.no_grad():
            transformer.x_pad_token.normal_()
            transformer.cap_pad_token.normal_()
    pipeline = ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )
    pipeline.default_sample_size = 4  # not saved with the pipeline, whose own call has 1024 pixels
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


TINY_PIPELINES: dict[str, Callable[..., Any]] = {
    "stable_diffusion": tiny_sd,
    "stable_diffusion_xl": tiny_sdxl,
    "stable_diffusion_3": tiny_sd3,
    "flux": tiny_flux,
    "flux2_klein": tiny_flux2_klein,
    "z_image": tiny_z_image,
}
"""Family -> the function that builds its tiny pipeline."""


def tiny_pipeline(family: str = "stable_diffusion", *, seed: int = 0) -> Any:
    """Return a tiny pipeline of a family; the same `seed` gives the same weights.

    Raises:
        ValueError: the core has no family of that name.
    """
    if family not in TINY_PIPELINES:
        raise ValueError(f'no tiny pipeline of the family "{family}"; the families are: {", ".join(TINY_PIPELINES)}')
    return TINY_PIPELINES[family](seed=seed)
