"""Benchmark full-size CLIP models with random weights: seconds and memory of forward and backward passes on a GPU.

python plugins/alignprop-clip/tests/full_size.py --output docs/results/clip_full_size.md
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from alignprop_clip.architecture import Architecture
from alignprop_clip.encoder import Precision, load_clip
from alignprop_clip.testing import PROMPTS, random_state

MODELS = {"ViT-L-14": "clip_score, aesthetic", "ViT-H-14": "hpsv2, pickscore"}
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")


def measure(path: Path, name: str, precision: Precision, device: str, size: int, repeats: int) -> dict[str, Any]:
    """Time a batch of four; the first pass, which compiles kernels and embeds the prompts, is not counted."""
    encoder = load_clip(path, Architecture.from_name(name), precision=precision).to(device)
    seconds = []
    cuda = device == "cuda"
    for _ in range(repeats + 1):
        images = torch.rand(len(PROMPTS), 3, size, size, device=device, requires_grad=True)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        cosines = (encoder.images(images) * encoder.prompts(PROMPTS)).sum(-1)
        (gradient,) = torch.autograd.grad(cosines.sum(), images)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        assert gradient.isfinite().all()
        assert (gradient != 0).any()
    return {
        "seconds": sorted(seconds[1:])[repeats // 2],
        "peak": torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan"),
        "weights": sum(p.numel() * p.element_size() for p in encoder.parameters()) / 2**30,
        "gradient": gradient.abs().mean().item(),
    }


def main() -> None:
    """Measure every model in every precision and write a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    where = f"one {torch.cuda.get_device_name()}" if options.device == "cuda" else "the CPU"
    lines = [
        "# CLIP rewards at full size",
        "",
        f"Random weights, four images of {options.size} px, forward and backward to the pixels, on {where}, "
        f"torch {torch.__version__}; the median of {options.repeats}. Every gradient is finite and not zero.",
        "",
        f"    python plugins/alignprop-clip/tests/full_size.py --output {options.output}",
        "",
        "| model | rewards | precision | seconds | peak GiB | weights GiB | mean gradient |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    with TemporaryDirectory() as folder:
        for name in options.models:
            path = Path(folder) / "clip.pt"
            torch.save(random_state(Architecture.from_name(name)), path)
            for precision in PRECISIONS:
                result = measure(path, name, precision, options.device, options.size, options.repeats)
                lines.append(
                    f"| {name} | {MODELS.get(name, '')} | {precision} | {result['seconds']:.3f} | "
                    f"{result['peak']:.1f} | {result['weights']:.1f} | {result['gradient']:.1e} |"
                )
                print(lines[-1], flush=True)
    options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
