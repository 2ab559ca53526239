"""Trains the denoiser and its text encoder together on cached latents, and writes the whole pipeline folder.

    python -m alignprop_starter.make.train_unet [--seconds N]          # one GPU
    torchrun --nproc-per-node 2 -m alignprop_starter.make.train_unet   # two

v-prediction on a cosine schedule that ends in pure noise; captions are drawn anew at every visit, each attribute
sometimes left out, one in ten empty for classifier-free guidance; weights are averaged over steps (EMA).
"""

from __future__ import annotations

import json
import random
import string
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from alignprop_starter.make.common import Clock, Ranks, parser, render_set
from alignprop_starter.make.tokenizer import LENGTH, build_tokenizer
from alignprop_starter.scenes import Layout
from alignprop_starter.vocabulary import BACKGROUNDS, SPECIES, STYLES, caption

if TYPE_CHECKING:
    from alignprop_starter.make.graphs import GraphedSteps

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
#: Ways to write the number: left open (bare name, plural), then words and digits for one to four.
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
    """A three-layer CLIP text model of width 128; the token ids must be told, or the pooled output comes from
    position 0."""
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
    """All captions there are, tokenised: a table (species, number form, style or none, background or none, variant)
    of token ids.

    Variant 0 is the plain caption; variant 1 has words around it that mean nothing here, so that the model learns to
    pass them over.
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

    def draw(self, species: Tensor, number: Tensor, style: Tensor, background: Tensor) -> Tensor:
        """Token ids (B, 32) of a fitting caption for each scene, with attributes left out at random."""
        b = species.shape[0]
        luck = torch.rand(6, b, device=self.device)
        whole = luck[5] < 0.25
        name_number, name_style, name_place = ((luck[i] < 0.7) | whole for i in range(3))
        bare = ((luck[3] < 0.5) & (number > 1)).long()  # the plural, for half of the scenes that have several
        digit = (luck[3] < 0.1).long()
        word = torch.where(digit.bool(), 6 + number, 1 + number)
        word = torch.where((number == 1) & (luck[3] > 0.8), 6, word)  # "one" beside "a"
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
    """The training loss of one fresh batch: mean squared error of the v-prediction, captions and noise levels drawn
    anew.

    Noise levels are spread evenly over ``1000 * u ** skew`` (u in [0, 1]): less noise in the loss than independent
    draws; a skew under 1 trains more on high noise, where the number and the place of animals are decided.
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
        """Return the loss, a scalar; nothing here waits for the device."""
        b, device = self.batch, self.device
        rows = torch.randint(len(self.latents), (b,), device=device)
        z = self.latents[rows].float()
        ids = self.captions.draw(*self.labels[:, rows])
        u = (torch.arange(b, device=device) + torch.rand(b, device=device)) / b
        t = (1000 * u**self.skew).long().clamp(0, 999)
        a, s = self.bars[t].sqrt()[:, None, None, None], (1 - self.bars[t]).sqrt()[:, None, None, None]
        noise = torch.randn_like(z)
        noisy = (a * z + s * noise).to(dtype).contiguous(memory_format=torch.channels_last)
        guess = unet(noisy, t, text(ids)[0], return_dict=False)[0]
        return F.mse_loss(guess.float(), a * noise - s * z)


class PlainSteps:
    """Steps with autocast, fused AdamW and, on request, torch.compile: what the shipped weights were trained with."""

    def __init__(
        self,
        loss: Denoising,
        unet: UNet2DConditionModel,
        text: CLIPTextModel,
        ranks: Ranks,
        *,
        compiled: bool,
        device: str,
    ) -> None:
        self.loss, self.ranks, self.device, self.cuda = loss, ranks, device.split(":")[0], device.startswith("cuda")
        self.unet, self.text = unet.to(memory_format=torch.channels_last), text
        self.forward: Callable[..., Any] = torch.compile(unet) if compiled else unet
        self.parameters = [*unet.parameters(), *text.parameters()]
        self.averaged = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=self.cuda
        )
        self.total, self.count = torch.zeros((), device=device), 0

    def step(self, rate: float) -> None:
        """One optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.device, torch.bfloat16, enabled=self.cuda):
            loss = self.loss(self.forward, self.text)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.ranks.average([p.grad for p in self.parameters if p.grad is not None])
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.count += 1
        keep = min(0.9993, (self.count + 1) / (self.count + 20))
        torch._foreach_lerp_(self.averaged, [p.detach() for p in self.parameters], 1 - keep)
        self.total += loss.detach()

    def averaged_models(self) -> tuple[UNet2DConditionModel, CLIPTextModel]:
        """Copies with the running average of the weights."""
        return models_with(self.unet, self.text, self.averaged)


def models_with(
    unet: UNet2DConditionModel, text: CLIPTextModel, weights: list[Tensor]
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Float32 copies of both models on the CPU that hold `weights` (in the order of their parameters)."""
    copies = UNet2DConditionModel.from_config(unet.config), CLIPTextModel(text.config)
    with torch.no_grad():
        for p, value in zip([p for module in copies for p in module.parameters()], weights, strict=True):
            p.copy_(value)
    return copies


@torch.no_grad()
def cache_latents(vae: AutoencoderKL, n: int, seed: int, device: str, chunk: int = 16_384) -> tuple[Tensor, Layout]:
    """Render and encode `n` scenes: latents (n, 8, 16, 16) in bfloat16 and the layouts."""
    latents, layouts = [], []
    for i, start in enumerate(range(0, n, chunk)):
        images, layout = render_set(min(chunk, n - start), seed * 10_007 + i, device, split="train")
        layouts.append(layout)
        for part in torch.split(images, 512):
            with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device.startswith("cuda")):
                x = (part.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
                latents.append(vae.encode(x).latent_dist.mean.bfloat16())
    joined = {name: torch.cat([getattr(a, name) for a in layouts]) for name in layouts[0].__dataclass_fields__}
    return torch.cat(latents), Layout(**joined)


def save_pipeline(out: Path, unet: UNet2DConditionModel, text: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
    """Write ``pipeline/`` in half precision, the denoiser in files under 12 MB each; the autoencoder is read from
    there."""
    half_unet = UNet2DConditionModel.from_config(unet.config)
    half_unet.load_state_dict(unet.state_dict())
    half_text = CLIPTextModel(text.config)
    half_text.load_state_dict(text.state_dict())
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(out / "pipeline" / "vae").half(),
        unet=half_unet.half(),
        text_encoder=half_text.half(),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(out / "pipeline", max_shard_size="12MB")
    # diffusers loads its own models in float32 unless told otherwise, transformers in the precision its config names;
    # a plain from_pretrained() must give one precision throughout.
    config = out / "pipeline" / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def main() -> None:
    """Write ``pipeline/`` and ``unet-card.json``."""
    p = parser(__doc__, seconds=580, batch=512, rate=1e-3, scenes=400_000)
    p.add_argument("--save-every", type=float, default=150, help="seconds between copies written along the way")
    p.add_argument("--high-noise", type=float, default=1.0, metavar="SKEW", help="under 1: train more on high noise")
    p.add_argument(
        "--graphs",
        action="store_true",
        help="bfloat16 weights, every kernel replayed from CUDA graphs (see graphs.py)",
    )
    p.add_argument("--muon", action="store_true", help="with --graphs: Muon instead of AdamW for the matrices")
    p.add_argument("--resume", action="store_true", help="go on from the saved denoiser and text encoder")
    args = p.parse_args()
    ranks = Ranks()
    device = f"cuda:{ranks.rank}" if args.device == "cuda" else args.device
    chief = ranks.rank == 0
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True

    tokenizer = build_tokenizer()
    unet, text = UNet2DConditionModel(**UNET), CLIPTextModel(text_config(tokenizer))
    if args.resume:
        saved_unet = UNet2DConditionModel.from_pretrained(args.out / "pipeline" / "unet")
        unet.load_state_dict(saved_unet.float().state_dict())
        saved_text = CLIPTextModel.from_pretrained(args.out / "pipeline" / "text_encoder").float()
        text.load_state_dict(saved_text.state_dict())
    unet, text = unet.to(device), text.to(device)
    captions = Captions(tokenizer, device)
    began = time.monotonic()
    vae = AutoencoderKL.from_pretrained(args.out / "pipeline" / "vae").to(device, memory_format=torch.channels_last)
    latents, layout = cache_latents(vae, args.scenes, 50 + args.seed * 8 + ranks.rank, device)
    labels = torch.stack([layout.species, layout.number, layout.style, layout.background]).to(device)
    del vae
    if chief:
        spread = [round(s, 2) for s in latents[:4096].float().std((0, 2, 3)).tolist()]
        print(f"unet: {len(latents)} latents a rank in {time.monotonic() - began:.0f} s, spread {spread}", flush=True)

    torch.manual_seed(args.seed + 1000 * ranks.rank + 1)
    loss = Denoising(captions, latents, labels, args.batch, args.high_noise, device)
    steps: PlainSteps | GraphedSteps
    if args.graphs:
        from alignprop_starter.make.graphs import GraphedSteps

        steps = GraphedSteps(loss, unet, text, ranks, device=device, compiled=not args.no_compile, muon=args.muon)
    else:
        steps = PlainSteps(loss, unet, text, ranks, compiled=not args.no_compile, device=device)
    if chief:
        print(f"unet: ready to train after {time.monotonic() - began:.0f} s", flush=True)
    clock = Clock(args.seconds, ranks, device)
    saved = time.monotonic()
    while clock.tick():
        steps.step(clock.rate(args.rate, warmup=200))
        if clock.steps % 200 == 0 and chief:
            mean, spent = steps.total.item() / 200, time.monotonic() - clock.start
            speed = clock.steps * args.batch * ranks.count / spent
            print(
                f"unet: step {clock.steps} progress {clock.progress:.3f} loss {mean:.4f}, {speed:.0f} scenes a second",
                flush=True,
            )
        if clock.steps % 200 == 0:
            steps.total.zero_()
        if chief and clock.steps % 20 == 0 and time.monotonic() - saved > args.save_every:
            save_pipeline(args.out, *steps.averaged_models(), tokenizer)
            saved = time.monotonic()
    if chief:
        save_pipeline(args.out, *steps.averaged_models(), tokenizer)
        card = {
            "unet_parameters": sum(q.numel() for q in unet.parameters()),
            "text_parameters": sum(q.numel() for q in text.parameters()),
            "steps": clock.steps,
            "batch": args.batch * ranks.count,
            "seconds": args.seconds,
            "scenes": args.scenes * ranks.count,
        }
        (args.out / "unet-card.json").write_text(json.dumps(card, indent=2) + "\n")
        print("unet:", json.dumps(card), flush=True)
    ranks.close()


if __name__ == "__main__":
    main()
