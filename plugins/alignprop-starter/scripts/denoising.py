"""The denoiser's architecture, its training captions and its loss: shared by both kinds of training steps."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from caption_tokenizer import LENGTH
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from alignprop_starter.vocabulary import BACKGROUNDS, SPECIES, STYLES, caption

UNET = {
    "sample_size": 16,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": (96, 128, 192),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 128,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
}
#: Forms of the number: not named (bare name, plural), then words and digits for one to four.
_NUMBERS: tuple[int | str | None, ...] = (None, None, 1, 2, 3, 4, "one", "1", "2", "3", "4")
_FILLERS = (
    "a photo of",
    "a picture of",
    "picture:",
    "photo of",
    "an image of",
    "cute",
    "beautiful",
    "a drawing of",
    "please,",
    "very nice",
)


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Return the configuration of a CLIP text model with three layers of width 128.

    The end-of-text id must be set: otherwise transformers takes the pooled output from position 0.
    """
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=128,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class Captions:
    """All captions as token ids, in a table on the device.

    The row index is (species, form of the number, style or none, background or none, variant), in row-major order; the
    last row is the empty caption. Variant 0 is the plain caption. Variant 1 has a filler before it, so that the model
    learns to ignore unknown words.
    """

    def __init__(self, tokenizer: CLIPTokenizer, device: str) -> None:
        rng = random.Random(0)
        texts = []
        for animal in SPECIES:
            for form, number in enumerate(_NUMBERS):
                for style in (None, *STYLES):
                    for background in (None, *BACKGROUNDS):
                        plain = caption(animal, number, style, background, many=form == 1)
                        texts += [plain, f"{self._filler(rng)} {plain}"]
        texts.append("")
        ids = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").input_ids
        self.table = ids.to(device=device, dtype=torch.int32)
        self.device = device

    @staticmethod
    def _filler(rng: random.Random) -> str:
        if rng.random() < 0.6:
            return rng.choice(_FILLERS)
        return "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(2, 7)))

    def sample(self, species: Tensor, number: Tensor, style: Tensor, background: Tensor) -> Tensor:
        """Sample a matching caption for each scene, with attributes omitted at random; return token ids (B, 32).

        Each argument is (B,): class indices, and numbers of animals from 1 to 4. 10% of the captions are empty, for
        classifier-free guidance.
        """
        b = species.shape[0]
        luck = torch.rand(6, b, device=self.device)
        complete = luck[5] < 0.25
        name_number, name_style, name_place = ((luck[i] < 0.7) | complete for i in range(3))
        bare = ((luck[3] < 0.5) & (number > 1)).long()  # the plural, for half of the scenes with several animals
        digit = (luck[3] < 0.1).long()
        word = torch.where(digit.bool(), 6 + number, 1 + number)
        word = torch.where((number == 1) & (luck[3] > 0.8), 6, word)  # "one" as well as "a"
        form = torch.where(name_number, word, bare)
        styled = torch.where(name_style, style + 1, 0)
        placed = torch.where(name_place, background + 1, 0)
        variant = (luck[4] < 0.05).long()
        row = (
            ((species * len(_NUMBERS) + form) * (len(STYLES) + 1) + styled) * (len(BACKGROUNDS) + 1) + placed
        ) * 2 + variant
        row = torch.where(luck[4] > 0.9, len(self.table) - 1, row)
        ids: Tensor = self.table[row].long()
        return ids


class Denoising:
    """Training loss of a new random batch: mean squared error of the v-prediction.

    The loss is || v - v_theta(a z + s n, t) ||^2 with v = a n - s z, where a^2 is the cumulative alpha at t and s^2 =
    1 - a^2. Timesteps are 1000 * u ** skew with stratified u in [0, 1], which has less variance than independent
    samples. A skew below 1 trains more on high noise levels, which decide the number and the place of animals.
    """

    def __init__(
        self, captions: Captions, latents: Tensor, labels: Tensor, batch: int, skew: float, device: str
    ) -> None:
        self.captions, self.latents, self.labels = captions, latents, labels
        self.batch, self.skew, self.device = batch, skew, device
        self.bars = DDIMScheduler(**SCHEDULER).alphas_cumprod.to(device)

    def __call__(
        self, unet: Callable[..., Any], text: Callable[..., Any], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Return the loss, a scalar; no host synchronization."""
        b, device = self.batch, self.device
        rows = torch.randint(len(self.latents), (b,), device=device)
        z = self.latents[rows].float()
        ids = self.captions.sample(*self.labels[:, rows])
        u = (torch.arange(b, device=device) + torch.rand(b, device=device)) / b
        t = (1000 * u**self.skew).long().clamp(0, 999)
        a, s = self.bars[t].sqrt()[:, None, None, None], (1 - self.bars[t]).sqrt()[:, None, None, None]
        noise = torch.randn_like(z)
        noisy = (a * z + s * noise).to(dtype).contiguous(memory_format=torch.channels_last)
        guess = unet(noisy, t, text(ids)[0], return_dict=False)[0]
        return F.mse_loss(guess.float(), a * noise - s * z)


def models_with(
    unet: UNet2DConditionModel, text: CLIPTextModel, weights: list[Tensor]
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Return float32 copies of both models on the CPU with the given weights, in the order of their parameters."""
    copies = UNet2DConditionModel.from_config(unet.config), CLIPTextModel(text.config)
    with torch.no_grad():
        for p, value in zip([p for module in copies for p in module.parameters()], weights, strict=True):
            p.copy_(value)
    return copies
