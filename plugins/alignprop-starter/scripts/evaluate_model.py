"""Evaluates how well generated images follow their prompts, with the judge.

    python plugins/alignprop-starter/scripts/evaluate_model.py [--images N]

Uses full prompts (number, style, species and background), 12 DDIM steps, guidance scale 3 and one image per prompt.
Combinations that were excluded from training are reported separately. Writes `evaluation.json` and a grid of images.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from training_common import PACKAGE

from alignprop_starter.judge import ATTRIBUTES, Judge, read_judge
from alignprop_starter.scenes import heldout_combinations
from alignprop_starter.vocabulary import BACKGROUNDS, PLACES, SPECIES, STYLES, caption

STEPS, GUIDANCE = 12, 3.0


def load_pipeline(root: Path, device: str) -> StableDiffusionPipeline:
    """Load the pipeline in `root`, in float32."""
    pipe = StableDiffusionPipeline.from_pretrained(root / "pipeline").to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def generate(pipe: StableDiffusionPipeline, prompts: list[str], seed: int, batch: int = 128) -> Tensor:
    """Generate images (n, 3, 128, 128) in [0, 1] on the CPU; noise depends on the seed and the position only."""
    noise = torch.randn(
        len(prompts), pipe.unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(seed)
    )
    images = []
    for i in range(0, len(prompts), batch):
        out = pipe(
            prompts[i : i + batch],
            latents=noise[i : i + batch].to(pipe.device),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            output_type="pt",
        )
        images.append(out.images.float().cpu())
    return torch.cat(images)


@torch.no_grad()
def verdicts(judge: Judge, images: Tensor, requested: Tensor) -> dict[str, Tensor]:
    """Return masks (n,), per attribute and for `all`: whether the judge's class equals `requested`, (n, 4) indices."""
    device = next(judge.parameters()).device
    seen: dict[str, list[Tensor]] = {name: [] for name in ATTRIBUTES}
    for chunk in torch.split(images, 128):
        for name, logits in judge(chunk.to(device)).items():
            seen[name].append(logits.argmax(1).cpu())
    right = {name: torch.cat(parts) == requested[:, i] for i, (name, parts) in enumerate(seen.items())}
    right["all"] = torch.stack(list(right.values())).all(0)
    return right


def _share(right: dict[str, Tensor]) -> dict[str, float]:
    return {name: round(float(hits.float().mean()), 4) for name, hits in right.items()} | {"images": len(right["all"])}


def _balanced(combinations: Tensor, n: int, seed: int) -> Tensor:
    """Choose `n` random combinations, with the species in turn.

    Args:
        combinations: (m, 4) species, style, number - 1, background.
        n: number of rows.
        seed: seed of the choice.

    Returns:
        (n, 4) species, number - 1, style, background: the order of the judge's attributes.
    """
    rng = random.Random(seed)
    by_species = [[row.tolist() for row in combinations if row[0] == s] for s in range(len(SPECIES))]
    rows = [rng.choice(by_species[i % len(SPECIES)]) for i in range(n)]
    return torch.tensor(rows)[:, [0, 2, 1, 3]]


def _prompt(row: list[int]) -> str:
    return caption(SPECIES[row[0]], row[1] + 1, STYLES[row[2]], BACKGROUNDS[row[3]])


def grid(images: Tensor, columns: int) -> Image.Image:
    """Arrange images (n, 3, H, W) in a grid."""
    n, c, h, w = images.shape
    rows = n // columns
    sheet = (
        images[: rows * columns].view(rows, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c)
    )
    return Image.fromarray((sheet * 255).round().byte().numpy())


def main() -> None:
    """Print and write the results and the grid."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=2040, help="number of images for each of the two groups")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, default=PACKAGE)
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for evaluation.json and grid.webp (default: --root)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    out = args.out or args.root
    pipe, judge = (
        load_pipeline(args.root, args.device),
        read_judge(args.root / "judge" / "judge.safetensors", args.device),
    )

    held = heldout_combinations()
    report: dict[str, object] = {"steps": STEPS, "guidance_scale": GUIDANCE}
    for name, mask in (("seen", ~held), ("unseen", held)):
        rows = _balanced(mask.nonzero(), args.images, args.seed)
        images = generate(pipe, [_prompt(r) for r in rows.tolist()], args.seed)
        right = verdicts(judge, images, rows)
        report[name] = _share(right)
        if name == "seen":
            report["species"] = {
                s: round(float(right["species"][rows[:, 0] == i].float().mean()), 3) for i, s in enumerate(SPECIES)
            }
        print(name, json.dumps(report[name]), flush=True)
    bare = [SPECIES[i % len(SPECIES)] for i in range(args.images // 2)]
    requested = torch.tensor([[SPECIES.index(s), 0, 0, 0] for s in bare])
    bare_right = verdicts(judge, generate(pipe, bare, args.seed + 1), requested)["species"]
    report["bare_names_species"] = round(float(bare_right.float().mean()), 4)
    print("bare names:", report["bare_names_species"], flush=True)
    (out / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")

    rng = random.Random(4)
    shown = [
        caption(rng.choice(SPECIES), 1 + i % 4, STYLES[(i // 4) % 3], list(PLACES)[(i * 5 + i // 8) % 8])
        for i in range(min(40, args.images))
    ]
    grid(generate(pipe, shown, args.seed + 2), min(8, len(shown))).save(out / "grid.webp", quality=88, method=6)
    (out / "grid.txt").write_text("\n".join(shown) + "\n")


if __name__ == "__main__":
    main()
