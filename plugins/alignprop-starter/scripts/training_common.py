"""Shared by the training scripts: options, processes, the time budget, rendered data sets and image degradation."""

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

from alignprop_starter.scenes import Layout, render_layouts, sample_layouts

PACKAGE = Path(__file__).parents[1] / "src" / "alignprop_starter"
"""Source folder of the package; scripts write weights, prompts and artwork there by default."""


def parser(
    about: str | None, *, seconds: float, batch: int, rate: float, scenes: int, package: Path = PACKAGE
) -> argparse.ArgumentParser:
    """Return a parser with the options of all training scripts."""
    p = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    p.add_argument(
        "--seconds", type=float, default=seconds, help="training time; the learning-rate schedule follows it"
    )
    p.add_argument("--batch", type=int, default=batch, help="scenes per step and GPU")
    p.add_argument("--rate", type=float, default=rate, help="peak learning rate")
    p.add_argument("--scenes", type=int, default=scenes, help="scenes to render per GPU")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--no-compile", action="store_true")
    p.add_argument("--out", type=Path, default=package, help="folder to write to (default: the source of the package)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return p


class Ranks:
    """The processes of one training run: one, or several under torchrun."""

    def __init__(self) -> None:
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.count > 1:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

    def average(self, gradients: list[Tensor]) -> None:
        """Average gradients over all processes, in place."""
        if self.count > 1:
            for g in gradients:
                dist.all_reduce(g)
                g /= self.count

    def agree(self, value: float, device: str) -> float:
        """Return the value of rank 0 on all ranks."""
        if self.count == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64, device=device)
        dist.broadcast(box, 0)
        return float(box.item())

    def close(self) -> None:
        """Wait for all processes and close the process group."""
        if self.count > 1:
            dist.barrier()
            dist.destroy_process_group()


class Clock:
    """Training progress from 0 to 1 by elapsed time.

    The time is that of rank 0, shared every few steps, so that all ranks have the same learning rate and stop together.
    """

    def __init__(self, seconds: float, ranks: Ranks, device: str, every: int = 20) -> None:
        self.seconds, self.ranks, self.device, self.every = seconds, ranks, device, every
        self.start, self.steps, self.progress = time.monotonic(), 0, 0.0

    def tick(self) -> bool:
        """Count a step; return False when the time is over."""
        if self.steps % self.every == 0:
            self.progress = self.ranks.agree((time.monotonic() - self.start) / self.seconds, self.device)
        self.steps += 1
        return self.progress < 1

    def rate(self, peak: float, warmup: int = 100) -> float:
        """Return the learning rate: linear warm-up over `warmup` steps, then cosine from `peak` to 1% of it."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(self.progress, 1.0)))
        return peak * max(cosine, 0.01) * min(1.0, self.steps / warmup)


def render_set(n: int, seed: int, device: str, *, split: str, chunk: int = 2048) -> tuple[Tensor, Layout]:
    """Render `n` scenes to images (n, 3, 128, 128), uint8 on `device`, and return them with their layout."""
    layout = sample_layouts(n, seed, split=split)
    images = torch.empty(n, 3, 128, 128, dtype=torch.uint8, device=device)
    for i in range(0, n, chunk):
        images[i : i + chunk] = (render_layouts(layout[i : i + chunk], device) * 255).round().byte()
    return images, layout


def damage(images: Tensor) -> Tensor:
    """Add random blur, noise and color changes, similar to those of a decoder.

    A network trained on degraded scenes also works on generated images.

    Args:
        images: (B, 3, H, W) in [0, 1] with even sides; not modified.
    """
    b = images.shape[0]
    small = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    blend = torch.rand(b, 1, 1, 1, device=images.device) ** 2 * 0.8
    images = images + blend * (small - images)
    gain = 1 + 0.08 * (torch.rand(b, 3, 1, 1, device=images.device) - 0.5)
    noise = torch.randn_like(images) * 0.05 * torch.rand(b, 1, 1, 1, device=images.device)
    return (images * gain + noise).clamp(0, 1)
