"""Trains the autoencoder on rendered scenes.

    python plugins/alignprop-starter/scripts/train_vae.py [--seconds N]

The loss is L1 + MSE (times `--mse`) + L1 of image gradients + a KL term with a small weight. After training, mean and
standard deviation of the latents are folded into the two 1x1 convolutions at the bottleneck, so that every latent
channel has mean 0 and standard deviation 1, and the scaling factor is 1.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from training_common import Clock, Ranks, parser, render_set

CHANNELS = 8
CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": CHANNELS,
    "sample_size": 128,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (32, 64, 104, 104),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "scaling_factor": 1.0,
    "force_upcast": False,
}


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the horizontal and vertical differences of neighboring pixels of images (B, C, H, W)."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


class _Step(torch.nn.Module):
    """Computes the loss of images (B, 3, 128, 128) in [-1, 1]; one module, so that torch.compile sees all of it."""

    def __init__(self, vae: AutoencoderKL, mse: float, kl: float) -> None:
        super().__init__()
        self.vae, self.mse, self.kl = vae, mse, kl

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        mean, logvar = self.vae.quant_conv(self.vae.encoder(x)).chunk(2, 1)
        mean, logvar = mean.float(), logvar.float().clamp(-30, 20)
        z = mean + torch.exp(0.5 * logvar) * noise
        y = self.vae.decoder(self.vae.post_quant_conv(z)).float()
        rebuilt = F.l1_loss(y, x) + self.mse * F.mse_loss(y, x)
        for a, b in zip(edges(y), edges(x), strict=True):
            rebuilt = rebuilt + 0.5 * F.l1_loss(a, b)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        total: Tensor = rebuilt + self.kl * kl
        return total


@torch.no_grad()
def whiten(vae: AutoencoderKL, images: Tensor) -> None:
    """Rescale the bottleneck's convolutions in place, so that latents of `images` have mean 0 and std 1 per channel.

    Args:
        vae: encoder output and decoder input are rescaled by opposite factors, so reconstructions do not change.
        images: (n, 3, 128, 128) uint8.
    """
    means = torch.cat([vae.encode(i.float() / 127.5 - 1).latent_dist.mean for i in torch.split(images, 128)]).float()
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))  # (8,)
    down, up = vae.quant_conv, vae.post_quant_conv
    assert down is not None
    assert up is not None
    assert down.bias is not None
    assert up.bias is not None
    down.weight[:CHANNELS] /= std[:, None, None, None]
    down.bias[:CHANNELS] = (down.bias[:CHANNELS] - mean) / std
    down.bias[CHANNELS:] -= 2 * std.log()  # the second half of the channels are log-variances
    up.bias += up.weight[:, :, 0, 0] @ mean
    up.weight *= std[None, :, None, None]


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Return the PSNR in decibels, the mean over uint8 images of 10 log10(1 / MSE) with pixels in [0, 1]."""
    found = []
    for chunk in torch.split(images, 64):
        x = chunk.float() / 255
        y = (vae.decode(vae.encode(x * 2 - 1).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1)
        found.append(-10 * ((x - y) ** 2).mean((1, 2, 3)).log10())
    return round(float(torch.cat(found).mean()), 2)


def save_half(vae: AutoencoderKL, folder: Path) -> None:
    """Save a float16 copy; `vae` is not modified."""
    half = AutoencoderKL.from_config(vae.config)
    half.load_state_dict(vae.state_dict())
    half.half().save_pretrained(folder)


def main() -> None:
    """Write `pipeline/vae` and `vae-card.json`."""
    p = parser(__doc__, seconds=330, batch=128, rate=1.2e-3, scenes=160_000)
    p.add_argument("--mse", type=float, default=2.0, help="weight of the squared error")
    p.add_argument("--kl", type=float, default=1e-7)
    args = p.parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    cuda = args.device.startswith("cuda")
    began = time.monotonic()
    images, _ = render_set(args.scenes, args.seed, args.device, split="train")
    print(f"vae: {args.scenes} scenes in {time.monotonic() - began:.1f} s", flush=True)

    folder = args.out / "pipeline" / "vae"
    vae = AutoencoderKL(**CONFIG).to(args.device, memory_format=torch.channels_last).train()
    parameters = [q for q in vae.parameters() if q.requires_grad]
    step = _Step(vae, args.mse, args.kl)
    forward = step if args.no_compile else torch.compile(step)
    optimizer = torch.optim.AdamW(parameters, lr=args.rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=cuda)
    clock = Clock(args.seconds, Ranks(), args.device)
    while clock.tick():
        for group in optimizer.param_groups:
            group["lr"] = clock.rate(args.rate)
        rows = torch.randint(len(images), (args.batch,), device=args.device)
        x = (images[rows].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        noise = torch.randn(args.batch, CHANNELS, 16, 16, device=args.device)
        with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=cuda):
            loss = forward(x, noise)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if clock.steps % 250 == 0:
            print(f"vae: step {clock.steps} progress {clock.progress:.2f} loss {loss.item():.4f}", flush=True)

    vae.eval()
    whiten(vae, images[:8192])
    fresh, _ = render_set(min(2048, args.scenes), 1_000_000 + args.seed, args.device, split="all")
    save_half(vae, folder)
    saved = AutoencoderKL.from_pretrained(folder).to(args.device)
    card = {
        "parameters": sum(p.numel() for p in vae.parameters()),
        "steps": clock.steps,
        "seconds": args.seconds,
        "psnr_unseen": psnr(saved, fresh),
        "psnr_seen": psnr(saved, images[:2048]),
        "unseen_scenes": len(fresh),
    }
    (args.out / "vae-card.json").write_text(json.dumps(card, indent=2) + "\n")
    print("vae:", json.dumps(card), flush=True)


if __name__ == "__main__":
    main()
