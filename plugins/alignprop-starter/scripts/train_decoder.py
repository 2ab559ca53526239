"""Trains the decoder of the autoencoder for sharper images; latents do not change.

    python plugins/alignprop-starter/scripts/train_decoder.py [--seconds N]

Second stage after `train_vae.py`. The encoder is frozen, so the denoiser remains valid. The loss is L1 + MSE (times
`--mse`) + L1 of image gradients, with a higher weight in the boxes of animals. After the share `--plain` of the time, a
hinge loss with a patch discriminator and an L1 distance of the discriminator's features are added (Wang et al.,
"pix2pixHD", 2018). Their gradient at the image is a fixed share of the reconstruction gradient. With the squared error
alone, uncertain stripes become gray.
"""

from __future__ import annotations

import json
import math
import time

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from train_vae import CHANNELS, edges, psnr, save_half
from training_common import Clock, Ranks, parser, render_set

from alignprop_starter.scenes import SIZE, Layout


class Patches(nn.Module):
    """Patch discriminator with spectral normalization."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        sizes = [(3, width, 2), (width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 4 * width, 1)]
        self.layers = nn.ModuleList(spectral_norm(nn.Conv2d(a, b, 4, stride=s, padding=1)) for a, b, s in sizes)
        self.last = spectral_norm(nn.Conv2d(4 * width, 1, 3, padding=1))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features of four layers, and logits (B, 1, H', W'), of images (B, 3, H, W) in [-1, 1]."""
        found = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            found.append(x)
        return [*found, self.last(x)]


class Decoding(nn.Module):
    """The decoder in one module, so that torch.compile sees all of it."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> Tensor:
        """Decode latents (B, 8, 16, 16) to float32 images (B, 3, 128, 128) in [-1, 1]."""
        images: Tensor = self.vae.decoder(self.vae.post_quant_conv(z)).float()
        return images


def reconstruction_loss(found: Tensor, wanted: Tensor, weight: Tensor, mse: float) -> Tensor:
    """L1 + MSE + L1 of image gradients, for images (B, 3, H, W) in [-1, 1] and a `weight` (B, 1, H, W) with mean 1."""
    error = found - wanted
    loss = (weight * (error.abs() + mse * error.square())).mean()
    for (a, b), w in zip(
        zip(edges(found), edges(wanted), strict=True), (weight[..., 1:], weight[..., 1:, :]), strict=True
    ):
        loss = loss + 0.5 * (w * (a - b).abs()).mean()
    return loss


def box_weight(boxes: Tensor, animals: float) -> Tensor:
    """Return weights (B, 1, 128, 128) with mean 1 that are `animals` times higher in the boxes (B, N, 4, in pixels)."""
    at = torch.arange(SIZE, device=boxes.device) + 0.5
    left, top, right, bottom = boxes.unbind(-1)
    across = (at >= left[..., None]) & (at < right[..., None])  # (B, N, W)
    down = (at >= top[..., None]) & (at < bottom[..., None])  # (B, N, H)
    inside = (down[..., :, None] & across[..., None, :]).any(1, keepdim=True)
    weight = 1 + (animals - 1) * inside.float()
    return weight / weight.mean()


@torch.no_grad()
def detail(vae: AutoencoderKL, images: Tensor, boxes: Tensor) -> float:
    """Return the sharpness of reconstructed animals relative to the original (1: equally sharp).

    It is the ratio of the mean absolute differences of neighboring pixels inside the boxes.

    Args:
        vae: the autoencoder.
        images: (n, 3, 128, 128) uint8.
        boxes: (n, N, 4) in pixels.
    """
    found = wanted = 0.0
    for chunk, places in zip(torch.split(images, 64), torch.split(boxes, 64), strict=True):
        x = chunk.float() / 127.5 - 1
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        inside = (box_weight(places, 2.0) > 1)[..., 1:]
        found += float((edges(y)[0].abs() * inside).sum())
        wanted += float((edges(x)[0].abs() * inside).sum())
    return round(found / wanted, 3)


def train(
    vae: AutoencoderKL, images: Tensor, latents: Tensor, layout: Layout, *, seconds: float, batch: int, rate: float,
    mse: float, animals: float, noise: float, plain: float, adversarial: float, compiled: bool, device: str,
) -> int:  # fmt: skip
    """Train the decoder in place and return the number of steps; the result is a running average of its weights."""
    cuda = device.startswith("cuda")
    kind = device.split(":")[0]
    decoding, patches = Decoding(vae), Patches().to(device).to(memory_format=torch.channels_last)
    decode = torch.compile(decoding) if compiled else decoding
    discriminate = torch.compile(patches) if compiled else patches
    parameters = [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]
    averaged = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=cuda)
    critic = torch.optim.AdamW(patches.parameters(), lr=2e-4, betas=(0.5, 0.9), weight_decay=0.0, fused=cuda)
    boxes = layout.boxes.to(device)
    clock = Clock(seconds, Ranks(), device)
    while clock.tick():
        use_critic = clock.progress >= plain
        share = (clock.progress - plain) / (1 - plain) if use_critic else clock.progress / plain
        # Each stage has its own cosine schedule, the second with a lower peak. The weight of the discriminator grows
        # linearly over the first tenth of its stage.
        peak = rate * (0.4 if use_critic else 1.0) * min(1.0, clock.steps / 200)
        for group in optimizer.param_groups:
            group["lr"] = peak * max(0.5 * (1 + math.cos(math.pi * share)), 0.02)
        rows = torch.randint(len(images), (batch,), device=device)
        x = (images[rows].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        z = latents[rows].float()
        z = z + noise * torch.rand(batch, 1, 1, 1, device=device) * torch.randn_like(z)
        with torch.autocast(kind, torch.bfloat16, enabled=cuda):
            y = decode(z)
        leaf = y.detach().requires_grad_()
        loss = reconstruction_loss(leaf, x, box_weight(boxes[rows], animals), mse)
        # Gradients are combined at the image, (B, 3, 128, 128), and propagated through the decoder once.
        (gradient,) = torch.autograd.grad(loss, leaf)
        if use_critic:
            with torch.autocast(kind, torch.bfloat16, enabled=cuda):
                true, fake = [f.detach() for f in discriminate(x)], discriminate(leaf)
            adversarial_loss = -fake[-1].float().mean() + 4.0 * sum(
                F.l1_loss(f.float(), t.float()) for f, t in zip(fake[:-1], true[:-1], strict=True)
            )
            (other,) = torch.autograd.grad(adversarial_loss, leaf)
            gradient += adversarial * min(1.0, 10 * share) * gradient.norm() / (other.norm() + 1e-9) * other
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(y, gradient)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        keep = min(0.999, (clock.steps + 1) / (clock.steps + 20))
        torch._foreach_lerp_(averaged, [p.detach() for p in parameters], 1 - keep)
        if use_critic:
            with torch.autocast(kind, torch.bfloat16, enabled=cuda):
                on_true, on_fake = discriminate(x)[-1].float(), discriminate(y.detach())[-1].float()
                critic_loss = F.relu(1 - on_true).mean() + F.relu(1 + on_fake).mean()
            critic.zero_grad(set_to_none=True)
            torch.autograd.backward(critic_loss)
            critic.step()
        if clock.steps % 500 == 0:
            seen = f", critic {critic_loss.item():.3f}" if use_critic else ""
            print(f"decoder: step {clock.steps} progress {clock.progress:.2f} loss {loss.item():.4f}{seen}", flush=True)
    with torch.no_grad():
        for p, value in zip(parameters, averaged, strict=True):
            p.copy_(value)
    return clock.steps


def main() -> None:
    """Write `pipeline/vae` and `decoder-card.json`."""
    p = parser(__doc__, seconds=480, batch=64, rate=8e-4, scenes=160_000)
    p.add_argument("--mse", type=float, default=6.0, help="weight of the squared error")
    p.add_argument("--animals", type=float, default=3.0, help="weight of pixels in the boxes of animals")
    p.add_argument("--noise", type=float, default=0.1, help="maximum std of noise added to latents (their std is 1)")
    p.add_argument("--plain", type=float, default=0.6, help="share of the training time without the discriminator")
    p.add_argument(
        "--adversarial", type=float, default=0.3, help="its gradient norm at the image, relative to the rest"
    )
    args = p.parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    folder = args.out / "pipeline" / "vae"
    vae = AutoencoderKL.from_pretrained(folder).to(args.device, memory_format=torch.channels_last).eval()
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    began = time.monotonic()
    images, layout = render_set(args.scenes, args.seed, args.device, split="train")
    with torch.no_grad():
        latents = torch.cat([vae.encode(i.float() / 127.5 - 1).latent_dist.mean for i in torch.split(images, 256)])
    assert latents.shape[1] == CHANNELS
    print(f"decoder: {args.scenes} scenes and their latents in {time.monotonic() - began:.1f} s", flush=True)
    fresh, places = render_set(min(2048, args.scenes), 1_000_000 + args.seed, args.device, split="all")
    boxes = places.boxes.to(args.device)
    before = {"psnr_unseen": psnr(vae, fresh), "detail_unseen": detail(vae, fresh, boxes)}
    steps = train(
        vae, images, latents, layout, seconds=args.seconds, batch=args.batch, rate=args.rate, mse=args.mse,
        animals=args.animals, noise=args.noise, plain=args.plain, adversarial=args.adversarial,
        compiled=not args.no_compile, device=args.device,
    )  # fmt: skip
    save_half(vae, folder)
    saved = AutoencoderKL.from_pretrained(folder).to(args.device)
    card = {
        "steps": steps,
        "seconds": args.seconds,
        "before": before,
        "psnr_unseen": psnr(saved, fresh),
        "detail_unseen": detail(saved, fresh, boxes),
        "unseen_scenes": len(fresh),
    }
    (args.out / "decoder-card.json").write_text(json.dumps(card, indent=2) + "\n")
    print("decoder:", json.dumps(card), flush=True)


if __name__ == "__main__":
    main()
