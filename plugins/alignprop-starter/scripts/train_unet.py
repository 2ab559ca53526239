"""Trains the denoiser together with its text encoder on cached latents, and writes the pipeline folder.

    python plugins/alignprop-starter/scripts/train_unet.py [--seconds N]          # one GPU
    torchrun --nproc-per-node 2 plugins/alignprop-starter/scripts/train_unet.py   # two GPUs

v-prediction with a cosine schedule that ends in pure noise. Captions are sampled anew in every step, attributes are
omitted at random, and 10% of the captions are empty for classifier-free guidance. The saved weights are a running
average (EMA).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from caption_tokenizer import build_tokenizer
from cuda_graphs import GraphedSteps
from denoising import SCHEDULER, UNET, Captions, Denoising, models_with, text_config
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from training_common import Clock, Ranks, parser, render_set
from transformers import CLIPTextModel, CLIPTokenizer

from alignprop_starter.scenes import Layout


class PlainSteps:
    """Training steps with autocast, fused AdamW and optionally torch.compile."""

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
        """Take one optimizer step with learning rate `rate`."""
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
        # Running average with a window that grows to about 1,400 steps.
        keep = min(0.9993, (self.count + 1) / (self.count + 20))
        torch._foreach_lerp_(self.averaged, [p.detach() for p in self.parameters], 1 - keep)
        self.total += loss.detach()

    def averaged_models(self) -> tuple[UNet2DConditionModel, CLIPTextModel]:
        """Return copies of both models with the averaged weights."""
        return models_with(self.unet, self.text, self.averaged)


@torch.no_grad()
def cache_latents(vae: AutoencoderKL, n: int, seed: int, device: str, chunk: int = 16_384) -> tuple[Tensor, Layout]:
    """Render and encode `n` scenes; return latents (n, 8, 16, 16) in bfloat16, and the layouts."""
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
    """Write `pipeline/` in float16, with the denoiser in files below 12 MB; the autoencoder must be there already."""
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
    # By default diffusers loads its models in float32, and transformers in the dtype of the config. Setting the dtype
    # here makes a plain from_pretrained() load everything in float32.
    config = out / "pipeline" / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def main() -> None:
    """Write `pipeline/` and `unet-card.json`."""
    p = parser(__doc__, seconds=580, batch=512, rate=1e-3, scenes=400_000)
    p.add_argument("--save-every", type=float, default=150, help="seconds between intermediate saves")
    p.add_argument("--high-noise", type=float, default=1.0, metavar="SKEW", help="below 1: train more on high noise")
    p.add_argument(
        "--graphs",
        action="store_true",
        help="bfloat16 weights and CUDA graphs (see cuda_graphs.py)",
    )
    p.add_argument("--muon", action="store_true", help="with --graphs: Muon instead of AdamW for matrices")
    p.add_argument("--resume", action="store_true", help="continue from the saved denoiser and text encoder")
    args = p.parse_args()
    ranks = Ranks()
    device = f"cuda:{ranks.rank}" if args.device == "cuda" else args.device
    main_rank = ranks.rank == 0
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
    if main_rank:
        std = [round(s, 2) for s in latents[:4096].float().std((0, 2, 3)).tolist()]
        print(
            f"unet: {len(latents)} latents per rank in {time.monotonic() - began:.0f} s, channel std {std}",
            flush=True,
        )

    torch.manual_seed(args.seed + 1000 * ranks.rank + 1)
    loss = Denoising(captions, latents, labels, args.batch, args.high_noise, device)
    steps: PlainSteps | GraphedSteps
    if args.graphs:
        steps = GraphedSteps(loss, unet, text, ranks, device=device, compiled=not args.no_compile, muon=args.muon)
    else:
        steps = PlainSteps(loss, unet, text, ranks, compiled=not args.no_compile, device=device)
    if main_rank:
        print(f"unet: ready to train after {time.monotonic() - began:.0f} s", flush=True)
    clock = Clock(args.seconds, ranks, device)
    saved = time.monotonic()
    while clock.tick():
        steps.step(clock.rate(args.rate, warmup=200))
        if clock.steps % 200 == 0 and main_rank:
            mean, spent = steps.total.item() / 200, time.monotonic() - clock.start
            speed = clock.steps * args.batch * ranks.count / spent
            print(
                f"unet: step {clock.steps} progress {clock.progress:.3f} loss {mean:.4f}, {speed:.0f} scenes/s",
                flush=True,
            )
        if clock.steps % 200 == 0:
            steps.total.zero_()
        if main_rank and clock.steps % 20 == 0 and time.monotonic() - saved > args.save_every:
            save_pipeline(args.out, *steps.averaged_models(), tokenizer)
            saved = time.monotonic()
    if main_rank:
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
