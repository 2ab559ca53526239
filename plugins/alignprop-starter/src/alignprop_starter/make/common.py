"""What the training scripts share: a clock that boxes a run by time or steps, devices, scenes kept on the device and
the damage done to them."""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from alignprop_starter.scenes import Layout, draw_layouts, paint

PACKAGE = Path(__file__).parents[1]


def parser(about: str | None, *, seconds: float, batch: int, rate: float, scenes: int) -> argparse.ArgumentParser:
    """The options every training script has."""
    p = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    p.add_argument(
        "--seconds", type=float, default=seconds, help="how long to train (the rate's schedule follows the clock)"
    )
    p.add_argument("--batch", type=int, default=batch, help="scenes a step (a GPU)")
    p.add_argument("--rate", type=float, default=rate, help="peak learning rate")
    p.add_argument("--scenes", type=int, default=scenes, help="how many scenes to render (a GPU)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--no-compile", action="store_true")
    p.add_argument("--out", type=Path, default=PACKAGE, help="the package's folder, or another to write to")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return p


class Ranks:
    """The processes of one training run: one, or several under ``torchrun``."""

    def __init__(self) -> None:
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.count > 1:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

    def average(self, gradients: list[Tensor]) -> None:
        """Average gradients over the ranks, in place."""
        if self.count > 1:
            for g in gradients:
                dist.all_reduce(g)
                g /= self.count

    def agree(self, value: float, device: str) -> float:
        """Rank 0's value, on every rank."""
        if self.count == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64, device=device)
        dist.broadcast(box, 0)
        return float(box.item())

    def close(self) -> None:
        """Wait for everyone, then part."""
        if self.count > 1:
            dist.barrier()
            dist.destroy_process_group()


class Clock:
    """Progress from 0 to 1 by elapsed time, read from rank 0 every few steps so that all ranks follow one schedule."""

    def __init__(self, seconds: float, ranks: Ranks, device: str, every: int = 20) -> None:
        self.seconds, self.ranks, self.device, self.every = seconds, ranks, device, every
        self.start, self.steps, self.progress = time.monotonic(), 0, 0.0

    def tick(self) -> bool:
        """Count a step; False once the time is over."""
        if self.steps % self.every == 0:
            self.progress = self.ranks.agree((time.monotonic() - self.start) / self.seconds, self.device)
        self.steps += 1
        return self.progress < 1

    def rate(self, peak: float, warmup: int = 100) -> float:
        """Cosine schedule from `peak` to a hundredth of it, after a linear warm-up of `warmup` steps."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(self.progress, 1.0)))
        return peak * max(cosine, 0.01) * min(1.0, self.steps / warmup)


def render_set(n: int, seed: int, device: str, *, split: str, chunk: int = 2048) -> tuple[Tensor, Layout]:
    """Render `n` scenes into bytes: images (n, 3, 128, 128) uint8 on `device`, and their layout."""
    layout = draw_layouts(n, seed, split=split)
    images = torch.empty(n, 3, 128, 128, dtype=torch.uint8, device=device)
    for i in range(0, n, chunk):
        images[i : i + chunk] = (paint(layout[i : i + chunk], device) * 255).round().byte()
    return images, layout


def damage(images: Tensor) -> Tensor:
    """Blur, noise and colour changes like those of a decoder, so that a network trained on rendered pictures reads
    generated ones as well. Images (B, 3, H, W) in [0, 1], even sides; other ones come back."""
    b = images.shape[0]
    small = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    blend = torch.rand(b, 1, 1, 1, device=images.device) ** 2 * 0.8
    images = images + blend * (small - images)
    gain = 1 + 0.08 * (torch.rand(b, 3, 1, 1, device=images.device) - 0.5)
    noise = torch.randn_like(images) * 0.05 * torch.rand(b, 1, 1, 1, device=images.device)
    return (images * gain + noise).clamp(0, 1)
