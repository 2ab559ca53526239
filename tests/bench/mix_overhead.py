"""Compare the time of a training step with three rewards under each mix: one trainer, alternating modes.

Networks have the sizes of Stable Diffusion 1.5 and of CLIP's ViT-L/14 and ViT-H/14, with random weights, which take as
much time as trained ones. The third reward is the JPEG size. `--tiny` tests the script on a CPU.

    python -m tests.bench.mix_overhead --device cuda --rounds 6
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from alignprop_core.config.load import load_config
from alignprop_core.config.rewards import MixConfig
from alignprop_core.registry.registry import default_registry
from alignprop_core.reward import ImageBatch, Reward
from alignprop_core.training.trainer import Trainer
from tests.support.tiny import tiny_sd

MODES = {
    "sum": MixConfig(),
    "balanced": MixConfig(combine="balanced"),
    "balanced at the latent": MixConfig(combine="balanced", balance_at="latent"),
    "pcgrad": MixConfig(combine="pcgrad"),
}
SIZES = {"clip_l": (1024, 24, 16, 4096), "clip_h": (1280, 32, 16, 5120), "clip_tiny": (32, 2, 2, 64)}


class RandomClip(Reward):
    """First normalized feature of a CLIP image tower with random weights."""

    def __init__(self, size: str) -> None:
        super().__init__()
        width, layers, heads, inner = SIZES[size]
        config = CLIPVisionConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=inner,
            patch_size=14,
            image_size=224,
            projection_dim=64,
        )
        self.network = CLIPVisionModelWithProjection(config)

    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) scores."""
        images = F.interpolate(batch.images, size=(224, 224), mode="bicubic", antialias=True, align_corners=False)
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            features = self.network(images).image_embeds
        return F.normalize(features.float(), dim=-1)[:, 0]


def stable_diffusion(device: str) -> StableDiffusionPipeline:
    """Return a pipeline of Stable Diffusion 1.5's size with random weights."""
    pipeline = tiny_sd(cross_attention_dim=768)
    text = CLIPTextConfig(
        vocab_size=len(pipeline.tokenizer),
        hidden_size=768,
        intermediate_size=3072,
        bos_token_id=pipeline.tokenizer.bos_token_id,
        eos_token_id=pipeline.tokenizer.eos_token_id,
    )
    with torch.device(device):  # initialize a billion random weights on the target device
        pipeline.unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval()
        pipeline.vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        ).eval()
        pipeline.text_encoder = CLIPTextModel(text).eval()
    return pipeline


class Counter(TorchDispatchMode):
    """Counts the tensor operations that reach a kernel."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the operation and execute it."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def count_operations(work: Callable[[], object]) -> tuple[int, int]:
    """Return the number of tensor operations of `work`, and the floating-point operations of its matrix products and
    convolutions."""
    with FlopCounterMode(display=False) as flops, Counter() as operations:
        work()
    return operations.count, flops.get_total_flops()


def main() -> None:
    """Print tables of seconds and operations per step of each mode, absolute and relative to `sum`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES), help="mixes; sum is required")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    sizes = ["clip_tiny", "clip_tiny"] if options.tiny else ["clip_l", "clip_h"]
    with torch.device(options.device):
        rewards: dict[str, Any] = {f"{size}_{i}": RandomClip(size) for i, size in enumerate(sizes)}
    registry = default_registry().with_rewards(rewards)
    dtype = torch.float32 if options.tiny else torch.bfloat16
    pipeline = (tiny_sd() if options.tiny else stable_diffusion(options.device)).to(options.device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "prompts.txt").write_text("a fox\nan owl\na boat\na hill\n")
        config = load_config(
            {
                "model": {"base": "owner/name"},  # not loaded: the trainer gets a pipeline
                "prompts": {"train": f"{folder}/prompts.txt"},
                "sampling": {"steps": 4 if options.tiny else options.steps, "guidance_scale": 7.5},
                "backprop": {"strategy": "last_k", "k": 2 if options.tiny else 8},
                "rewards": [{"name": "jpeg_compressibility"}, *({"name": name} for name in rewards)],
                "training": {
                    "batch_size": 4,
                    "device": options.device,
                    "mixed_precision": "no" if options.tiny else "bf16",
                },
                "output": f"{folder}/run",
            },
            registry=registry,
        )
        trainer = Trainer(config, registry=registry, pipeline=pipeline)
        times: dict[str, list[float]] = {name: [] for name in options.modes}
        peaks = dict.fromkeys(options.modes, 0.0)
        for turn in track(range(options.rounds + 1), "rounds", console=Console(stderr=True)):
            names = options.modes if turn % 2 else options.modes[::-1]
            for name in names:
                trainer.mix.config = MODES[name]
                if options.device != "cpu":
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                trainer.step()
                if options.device != "cpu":
                    torch.cuda.synchronize()
                    peaks[name] = torch.cuda.max_memory_allocated() / 2**30
                if turn:  # the first round is a warm-up and calibrates the terms
                    times[name].append(time.perf_counter() - start)
        work = {}
        for name in options.modes:
            trainer.mix.config = MODES[name]
            work[name] = count_operations(trainer.step)
    device = torch.cuda.get_device_name() if options.device != "cpu" else "CPU"
    print(f"{device}, torch {torch.__version__}, {options.rounds} rounds, {options.steps} denoising steps\n")
    print("| mix | seconds per step (median) | over `sum`: median | interquartile range | peak GiB |")
    print("| --- | --- | --- | --- | --- |")
    for name, seconds in times.items():
        over = [own / plain - 1 for own, plain in zip(seconds, times["sum"], strict=True)]
        low, middle, high = statistics.quantiles(over, n=4, method="inclusive")
        print(
            f"| {name} | {statistics.median(seconds):.3f} | {middle:+.1%} | {low:+.1%} to {high:+.1%} | "
            f"{peaks[name]:.1f} |"
        )
    print(
        "\n| mix | tensor operations per step | over `sum` | arithmetic, TFLOP | over `sum` |"
        "\n| --- | --- | --- | --- | --- |"
    )
    plain = work["sum"]
    for name, (operations, flops) in work.items():
        print(
            f"| {name} | {operations} | {operations / plain[0] - 1:+.1%} | {flops / 1e12:.4g} | "
            f"{flops / plain[1] - 1:+.1%} |"
        )
    for name, seconds in times.items():
        print(f"\n{name}: {' '.join(f'{value:.3f}' for value in seconds)}", end="")
    print()


if __name__ == "__main__":
    main()
