"""What every side of `gpu_step` shares: networks of Stable Diffusion 1.5's size and a CLIP ViT-L/14 reward.

Weights are random, which takes as much time and memory as trained ones.
"""

from __future__ import annotations

import copy
import gzip
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

from alignprop_core.reward import ImageBatch, Reward
from alignprop_core.testing.pipelines import BOS, EOS, tiny_sd, tiny_tokenizer

VOCABULARY = 49408
MERGES = slice(1, VOCABULARY - 256 - 256 - 2 + 1)
"""Lines of OpenAI's file of merges that CLIP uses: the first is a header, the vocabulary ends before the last."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClipReward(Reward):
    """Cosine between an image's CLIP embedding and a fixed random vector.

    Args:
        network: the image tower, in any dtype; the score is float32.
        seed: decides the vector.
    """

    target: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, network: CLIPVisionModelWithProjection, seed: int) -> None:
        super().__init__()
        self.network = network
        self.side: int = network.config.image_size
        target = torch.randn(network.config.projection_dim, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("target", F.normalize(target, dim=0))
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(CLIP_STD).view(3, 1, 1))
        self.to(network.device)

    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) cosines."""
        size = (self.side, self.side)
        images = F.interpolate(batch.images.float(), size, mode="bicubic", antialias=True, align_corners=False)
        pixels = ((images - self.mean) / self.std).to(self.network.dtype)
        return F.normalize(self.network(pixel_values=pixels).image_embeds.float(), dim=-1) @ self.target


class Models:
    """Random networks that all sides share: bfloat16 on a GPU, float32 on a CPU.

    Args:
        device: where the weights are initialized.
        tiny: networks of a test's size instead of the true ones.

    Attributes:
        pipeline: never run itself; each side runs its own copy with the same weights.
        rewards: as many as the row needs, each with its own network.
    """

    def __init__(self, device: torch.device, *, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.rewards: list[ClipReward] = []
        torch.manual_seed(0)
        with defaults(device, self.dtype):
            self.pipeline = _tiny_pipeline() if tiny else _stable_diffusion()
        # For what ignores the defaults, such as networks of the shipped tiny pipeline.
        self.pipeline.to(device, self.dtype)
        for part in (self.pipeline.unet, self.pipeline.vae, self.pipeline.text_encoder):
            part.requires_grad_(False).eval()

    def use_rewards(self, count: int) -> None:
        """Build or drop rewards until there are `count`, so that none adds to the memory of a row without it."""
        del self.rewards[count:]
        for seed in range(len(self.rewards), count):
            torch.manual_seed(seed)
            with defaults(self.device, self.dtype):
                tower = CLIPVisionModelWithProjection(_vision_config(self.tiny))
            reward = ClipReward(tower.to(self.device, self.dtype), seed)
            reward.freeze()
            self.rewards.append(reward)

    def copy(self) -> StableDiffusionPipeline:
        """Return a pipeline of new modules with the same weight tensors, so that a side adds no weights of its own."""
        parts = {name: _sharing(getattr(self.pipeline, name)) for name in ("vae", "text_encoder", "unet")}
        # The scheduler is made on the CPU in float32, as where a pipeline is loaded.
        scheduler = DDIMScheduler.from_config(self.pipeline.scheduler.config)
        return _pipeline(**parts, tokenizer=self.pipeline.tokenizer, scheduler=scheduler)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: object) -> tuple[Tensor, dict[str, Any]]:
        """Return the first reward's scores, in TRL's signature."""
        return self.rewards[0](ImageBatch(images=images, prompts=tuple(prompts))), {}


def _sharing(module: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


@contextmanager
def defaults(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Create tensors on a device in a dtype inside of the block, unless the code says otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def _pipeline(**parts: Any) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _tiny_pipeline() -> StableDiffusionPipeline:
    with torch.device("cpu"):
        pipeline = tiny_sd()
    pipeline.unet.register_to_config(sample_size=8)  # 64 pixels
    return pipeline


def _stable_diffusion() -> StableDiffusionPipeline:
    """Return Stable Diffusion 1.5's networks: arguments not named here are diffusers' and transformers' defaults."""
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
        scaling_factor=0.18215,
    )
    text = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return _pipeline(unet=unet, vae=vae, text_encoder=CLIPTextModel(text), tokenizer=_tokenizer(), scheduler=scheduler)


def _vision_config(tiny: bool) -> CLIPVisionConfig:
    if tiny:
        return CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            patch_size=14,
            image_size=28,
            projection_dim=16,
        )
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        image_size=224,
        projection_dim=768,
    )


def _tokenizer() -> CLIPTokenizer:
    """Return CLIP's tokenizer from open_clip's file of merges, or one on bytes where open_clip is missing.

    Both pad every prompt to 77 tokens, so time and memory are the same.
    """
    plain = tiny_tokenizer()
    spec = find_spec("open_clip")
    file = Path(str(spec.origin)).with_name("bpe_simple_vocab_16e6.txt.gz") if spec else None
    letters = [symbol for symbol, _ in sorted(plain.get_vocab().items(), key=lambda item: item[1])][:-2]
    if file is None or not file.is_file():
        print("open_clip is not installed: the tokenizer works on bytes")
        filler = [f"<|{n}|>" for n in range(VOCABULARY - len(letters) - 2)]
        symbols, merges = [*letters, *filler, BOS, EOS], []
    else:
        lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")[MERGES]
        merges = [tuple(line.split()) for line in lines]
        symbols = [*letters, *("".join(pair) for pair in merges), BOS, EOS]
    assert len(symbols) == VOCABULARY, len(symbols)
    return CLIPTokenizer(vocab={symbol: n for n, symbol in enumerate(symbols)}, merges=merges, model_max_length=77)
