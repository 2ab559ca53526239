"""Trains the aesthetic head on pairs of compositions.

    python plugins/alignprop-starter/scripts/train_aesthetic.py [--seconds N]

The head has the architecture of the LAION aesthetic predictor v2 (five linear layers with dropout and no activations).
Its input is the normalized image embedding of `weights/clip.safetensors`, which is not modified. The loss is
Bradley-Terry, -log sigmoid(better - worse). After training, the last layer is rescaled to the usual range of scores.
"""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from clip_files import read_clip
from compositions import ASPECTS, render_pairs
from open_clip import CLIP
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from train_clip import embed_images, share
from training_common import Clock, Ranks, parser

#: Mean and standard deviation of scores on the training images, similar to those of the original on typical images.
MEAN, STD = 5.5, 1.2
_WIDTHS, _DROPOUTS = (1024, 128, 64, 16, 1), (0.2, 0.2, 0.1)


class Head(nn.Module):
    """The head, with the state keys `layers.{0,2,4,6,7}` of the original."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise((width, *_WIDTHS))):
            layers.append(nn.Linear(a, b))
            if i < len(_DROPOUTS):
                layers.append(nn.Dropout(_DROPOUTS[i]))
        self.layers = nn.Sequential(*layers)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the scores (B,) of normalized embeddings (B, width)."""
        scores: Tensor = self.layers(embeddings)[:, 0]
        return scores


def read_head(path: Path, device: str = "cpu") -> Head:
    """Load the file of a head into a frozen float32 module."""
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (safe_open is not a mapping)
    head = Head(state["layers.0.weight"].shape[1])
    head.load_state_dict(state)
    return head.requires_grad_(False).eval().to(device)


def embed_pairs(model: CLIP, n: int, seed: int, device: str, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """Render `n` pairs; return embeddings (2, n, width) of the better and the worse images, and aspects (n,)."""
    found, aspects = [], []
    for i, start in enumerate(range(0, n, chunk)):
        pairs = render_pairs(min(chunk, n - start), seed + i, device)
        found.append(torch.stack([embed_images(model, pairs.better), embed_images(model, pairs.worse)]))
        aspects.append(pairs.aspect)
    return torch.cat(found, 1), torch.cat(aspects)


@torch.no_grad()
def rescale(head: Head, embeddings: Tensor) -> None:
    """Rescale the last layer in place, so that scores of `embeddings` (n, width) have mean `MEAN` and std `STD`."""
    scores = head(embeddings)
    factor = STD / scores.std()
    last = head.layers[-1]
    assert isinstance(last, nn.Linear)
    last.weight *= factor
    last.bias.copy_((last.bias - scores.mean()) * factor + MEAN)


@torch.no_grad()
def evaluate(path: Path, model: CLIP, n: int, seed: int, device: str) -> dict[str, object]:
    """Evaluate the file at `path` on `n` unseen pairs.

    Returns:
        `right`: share of pairs whose better image has the higher score, per aspect and over all. `gap`: mean
        difference of the scores, per aspect. `scores`: 1st, 50th and 99th percentile of all scores.
    """
    torch.manual_seed(seed)
    head = read_head(path, device)
    embeddings, aspects = embed_pairs(model, n, seed, device)
    better, worse = (head(e) for e in embeddings)
    right = better > worse
    gap = better - worse
    levels = torch.quantile(torch.cat([better, worse]), torch.tensor([0.01, 0.5, 0.99], device=device))
    return {
        "unseen_pairs": n,
        "right": {name: share(right[aspects == i]) for i, name in enumerate(ASPECTS)} | {"all": share(right)},
        "gap": {name: round(float(gap[aspects == i].mean()), 2) for i, name in enumerate(ASPECTS)},
        "scores": [round(v, 2) for v in levels.tolist()],
    }


def main() -> None:
    """Write `weights/aesthetic.safetensors` and `weights/aesthetic.json`."""
    args = parser(__doc__, seconds=30, batch=4096, rate=1e-3, scenes=60_000).parse_args()
    torch.manual_seed(args.seed)
    cuda = args.device.startswith("cuda")
    folder = args.out / "weights"
    tower = read_clip(folder / "clip.safetensors", args.device)
    began = time.monotonic()
    embeddings, _ = embed_pairs(tower, args.scenes, 9_000_000 + args.seed * 1000, args.device)
    print(f"aesthetic: {args.scenes} pairs in {time.monotonic() - began:.1f} s", flush=True)

    head = Head(embeddings.shape[2]).to(args.device).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=args.rate, weight_decay=0.01, fused=cuda)
    clock = Clock(args.seconds, Ranks(), args.device)
    while clock.tick():
        for group in optimizer.param_groups:
            group["lr"] = clock.rate(args.rate)
        rows = torch.randint(args.scenes, (args.batch,), device=args.device)
        better, worse = head(embeddings[:, rows].flatten(0, 1)).chunk(2)
        loss = F.softplus(worse - better).mean()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        if clock.steps % 2000 == 0:
            print(f"aesthetic: step {clock.steps} progress {clock.progress:.2f} loss {loss.item():.4f}", flush=True)

    head.eval()
    # Over the training images, better and worse together.
    rescale(head, embeddings.flatten(0, 1))
    path = folder / "aesthetic.safetensors"
    state = {name: value.detach().half().cpu().contiguous() for name, value in head.state_dict().items()}
    save_file(state, path, metadata={"format": "pt", "config": json.dumps({"clip": "starter"})})
    card = {
        "architecture": "the head of the LAION aesthetic predictor v2 on the embedding of clip.safetensors",
        "parameters": sum(p.numel() for p in head.parameters()),
        "bytes": path.stat().st_size,
        "steps": clock.steps,
        "batch": args.batch,
        "seconds": args.seconds,
        "pairs": args.scenes,
        "trained_on": "Pairs of rendered starter scenes that differ in one aspect of composition: animals that are "
        "complete, centered or on thirds, against animals that are cut off at an edge or corner; uniform light against "
        "patches of clashing colors; opaque animals against animals that are blended into the background; few props "
        "against many; no damage against blur, noise or blocks. These rules decided which image is better. There are "
        "no human ratings and no photographs in the training data, and the score is not a measure of beauty. The input "
        "is the image embedding of clip.safetensors, whose image tower was itself trained, with a small weight, on "
        "pairs of the same kind (other scenes).",
        **evaluate(path, tower, min(8000, args.scenes), 9_500_000 + args.seed * 1000, args.device),
    }
    path.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n")
    print("aesthetic:", json.dumps(card), flush=True)


if __name__ == "__main__":
    main()
