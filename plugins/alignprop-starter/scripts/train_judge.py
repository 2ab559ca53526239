"""Trains the judge on rendered scenes.

python plugins/alignprop-starter/scripts/train_judge.py [--seconds N]
"""

from __future__ import annotations

import json
import time

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Module
from training_common import Clock, Ranks, damage, parser, render_set

from alignprop_starter.judge import ATTRIBUTES, Judge, read_judge
from alignprop_starter.scenes import Layout


def labels(layout: Layout, device: str) -> dict[str, Tensor]:
    """Return the class indices of each attribute, as the judge's heads number them."""
    return {
        "species": layout.species.to(device),
        "number": layout.number.to(device) - 1,
        "style": layout.style.to(device),
        "background": layout.background.to(device),
    }


@torch.no_grad()
def accuracy(judge: Module, images: Tensor, truth: dict[str, Tensor], batch: int = 256) -> dict[str, float]:
    """Return the accuracy of each head, and the share of scenes for which all heads are correct (`all`)."""
    right = {name: [] for name in ATTRIBUTES}  # type: dict[str, list[Tensor]]
    for i in range(0, len(images), batch):
        for name, logits in judge(images[i : i + batch].float() / 255).items():
            right[name].append(logits.argmax(1) == truth[name][i : i + batch])
    joined = {name: torch.cat(parts) for name, parts in right.items()}
    joined["all"] = torch.stack(list(joined.values())).all(0)
    return {name: round(float(hits.float().mean()), 4) for name, hits in joined.items()}


def main() -> None:
    """Write `judge/judge.safetensors` and `judge/card.json`."""
    args = parser(__doc__, seconds=110, batch=384, rate=1.5e-3, scenes=120_000).parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    cuda = args.device.startswith("cuda")
    began = time.monotonic()
    images, layout = render_set(args.scenes, 2_000_000 + args.seed, args.device, split="all")
    truth = labels(layout, args.device)
    print(f"judge: {args.scenes} scenes in {time.monotonic() - began:.1f} s", flush=True)

    # Not compiled: with torch.compile this network returned NaN from the first steps on an H100 (torch 2.11).
    judge = Judge().to(args.device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=args.rate, weight_decay=0.02, fused=cuda)
    clock = Clock(args.seconds, Ranks(), args.device)
    while clock.tick():
        for group in optimizer.param_groups:
            group["lr"] = clock.rate(args.rate)
        rows = torch.randint(len(images), (args.batch,), device=args.device)
        batch = damage(images[rows].float() / 255).contiguous(memory_format=torch.channels_last)
        with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=cuda):
            logits = judge(batch)
        loss = torch.stack(
            [F.cross_entropy(logits[name].float(), truth[name][rows], label_smoothing=0.02) for name in ATTRIBUTES]
        ).sum()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        if clock.steps % 500 == 0:
            print(f"judge: step {clock.steps} progress {clock.progress:.2f} loss {loss.item():.3f}", flush=True)

    folder = args.out / "judge"
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in judge.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "judge.safetensors")
    del images
    fresh, layout = render_set(min(8192, args.scenes), 3_000_000 + args.seed, args.device, split="all")
    score = accuracy(read_judge(folder / "judge.safetensors", args.device), fresh, labels(layout, args.device))
    card = {
        "parameters": sum(p.numel() for p in judge.parameters()),
        "steps": clock.steps,
        "unseen_scenes": len(fresh),
        "accuracy": score,
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print("judge:", json.dumps(card), flush=True)


if __name__ == "__main__":
    main()
