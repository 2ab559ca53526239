"""Pipelines of true size with random weights, built where they run, in the GPU's dtype.

The text encoders are tiny, but as wide as the true ones, so that transformer and UNet get prompts of true shapes. The
configs are those of the public models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from alignprop_core.testing.pipelines import (
    tiny_pipeline,
    tiny_qwen_tokenizer,
    tiny_t5_tokenizer,
    tiny_tokenizer,
)
from tests.bench.gpu_models import ClipReward, defaults

FLUX_VAE = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}


def _clip(kind: Any, width: int) -> Any:
    tokenizer = tiny_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config)


def _t5() -> T5EncoderModel:
    words = len(tiny_t5_tokenizer())
    return T5EncoderModel(T5Config(vocab_size=words, d_model=4096, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def _qwen(kind: Any, layers: int) -> Any:
    config = Qwen3Config(
        vocab_size=len(tiny_qwen_tokenizer()),
        hidden_size=2560,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    return kind(config)


def _vae(latent_channels: int, **more: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=latent_channels,
        sample_size=1024,
        **more,
    )


def _sdxl() -> dict[str, Any]:
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return {
        "unet": unet,
        "vae": _vae(4, scaling_factor=0.13025, force_upcast=True),
        "text_encoder": _clip(CLIPTextModel, 768),
        "text_encoder_2": _clip(CLIPTextModelWithProjection, 1280),
    }


def _sd35() -> dict[str, Any]:
    transformer = SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        out_channels=16,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )
    return {
        "transformer": transformer,
        "vae": _vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        "text_encoder": _clip(CLIPTextModelWithProjection, 768),
        "text_encoder_2": _clip(CLIPTextModelWithProjection, 1280),
        "text_encoder_3": _t5(),
    }


def _flux() -> dict[str, Any]:
    return {
        "transformer": FluxTransformer2DModel(guidance_embeds=True),
        "vae": _vae(16, **FLUX_VAE),
        "text_encoder": _clip(CLIPTextModel, 768),
        "text_encoder_2": _t5(),
    }


def _klein() -> dict[str, Any]:
    transformer = Flux2Transformer2DModel(
        num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
    )
    return {
        "transformer": transformer,
        "vae": AutoencoderKLFlux2(),
        "text_encoder": _qwen(Qwen3ForCausalLM, 28),
    }


def _z_image() -> dict[str, Any]:
    return {
        "transformer": ZImageTransformer2DModel(axes_lens=[1536, 512, 512]),
        "vae": _vae(16, **FLUX_VAE),
        "text_encoder": _qwen(Qwen3Model, 2),
    }


def _flow(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**config)


def _tokenizers(names: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    return {name: make() for name, make in names.items()}


def build(name: str, device: torch.device, dtype: torch.dtype, *, tiny: bool) -> Any:
    """Return a pipeline of random weights, frozen, in eval mode; `tiny` for the tiny pipeline of its family.

    Args:
        name: a key of `MODELS`.
        device: where the weights are made; never on the CPU first.
        dtype: of the weights.
        tiny: networks of a test's size.
    """
    family, kind, networks, rest = MODELS[name]
    torch.manual_seed(0)
    if tiny:
        pipeline = tiny_pipeline(family)
    else:
        with defaults(device, dtype):
            parts = networks()
        pipeline = kind(**parts, **rest())
    pipeline.to(device, dtype)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    for part in ("unet", "vae"):  # as where a pipeline is loaded
        if hasattr(pipeline, part):
            getattr(pipeline, part).to(memory_format=torch.channels_last)
    return pipeline


def _ddim() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _flux_schedule() -> FlowMatchEulerDiscreteScheduler:
    return _flow(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)


_CLIPS = {"tokenizer": tiny_tokenizer, "tokenizer_2": tiny_tokenizer}
_QWEN = {"tokenizer": tiny_qwen_tokenizer}

MODELS: dict[str, tuple[str, Any, Callable[[], dict[str, Any]], Callable[[], dict[str, Any]]]] = {
    "sdxl": (
        "stable_diffusion_xl",
        StableDiffusionXLPipeline,
        _sdxl,
        lambda: {"scheduler": _ddim(), "add_watermarker": False, **_tokenizers(_CLIPS)},
    ),
    "sd35_medium": (
        "stable_diffusion_3",
        StableDiffusion3Pipeline,
        _sd35,
        lambda: {"scheduler": _flow(shift=3.0), **_tokenizers({**_CLIPS, "tokenizer_3": tiny_t5_tokenizer})},
    ),
    "flux_dev": (
        "flux",
        FluxPipeline,
        _flux,
        lambda: {
            "scheduler": _flux_schedule(),
            **_tokenizers({"tokenizer": tiny_tokenizer, "tokenizer_2": tiny_t5_tokenizer}),
        },
    ),
    "flux2_klein_4b": (
        "flux2_klein",
        Flux2KleinPipeline,
        _klein,
        lambda: {"scheduler": _flux_schedule(), "is_distilled": True, **_tokenizers(_QWEN)},
    ),
    "z_image": ("z_image", ZImagePipeline, _z_image, lambda: {"scheduler": _flow(shift=3.0), **_tokenizers(_QWEN)}),
}
"""Model -> its family, its pipeline, and functions that build its networks and its other parts."""


def clip_reward(device: torch.device, dtype: torch.dtype, *, tiny: bool) -> ClipReward:
    """Return a reward of CLIP ViT-H/14's size, frozen: the cosine with a fixed random vector."""
    size = (
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}
        if tiny
        else {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    )
    torch.manual_seed(1)
    with defaults(device, dtype):
        tower = CLIPVisionModelWithProjection(CLIPVisionConfig(patch_size=14, projection_dim=1024, **size))
    reward = ClipReward(tower.to(device, dtype), seed=2)
    reward.freeze()
    return reward
