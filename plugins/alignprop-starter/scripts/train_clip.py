"""Trains the small open_clip model on scenes and captions.

    python plugins/alignprop-starter/scripts/train_clip.py [--seconds N]

The loss is SigLIP's sigmoid loss (arXiv:2303.15343, eq. 1) over all pairs of captions and scenes in a batch, with the
true matches as targets. Half of the captions are near misses, in which one attribute of a scene is changed. A ranking
loss on pairs of compositions has a small weight, so that the image embedding retains what `train_aesthetic.py` needs.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from clip_captions import ATTRIBUTES, VALUES, Captions, alter, labels, matches
from clip_files import TOWERS, new_clip, normalise, read_clip, save_clip
from compositions import Pairs, render_pairs
from open_clip import CLIP
from torch import Tensor, nn
from training_common import Clock, Ranks, damage, parser

from alignprop_starter.scenes import Layout, render_layouts, sample_layouts

CANDIDATES = 100
_MAX_LOG_SCALE = math.log(100)


def render_bytes(layout: Layout, device: str, chunk: int = 2048) -> Tensor:
    """Render layouts to images (n, 3, 128, 128), uint8 on `device`."""
    images = torch.empty(len(layout), 3, 128, 128, dtype=torch.uint8, device=device)
    for i in range(0, len(layout), chunk):
        images[i : i + chunk] = (render_layouts(layout[i : i + chunk], device) * 255).round().byte()
    return images


def sample_numbers(n: int, seed: int, shares: tuple[float, ...]) -> Tensor:
    """Sample `n` numbers of animals, k with a probability proportional to `shares[k]`."""
    g = torch.Generator().manual_seed(seed)
    return torch.multinomial(torch.tensor(shares, dtype=torch.float32), n, replacement=True, generator=g)


def sigmoid_loss(logits: Tensor, fits: Tensor) -> Tensor:
    """SigLIP's loss: logits and matches (C, B), summed over captions and averaged over scenes."""
    return -F.logsigmoid(torch.where(fits, logits, -logits)).sum() / logits.shape[1]


def prepare(images: Tensor, *, damaged: bool) -> Tensor:
    """Convert uint8 images (B, 3, 128, 128) to the input of the vision tower, degraded if `damaged`."""
    x = images.float() / 255
    return normalise(damage(x) if damaged else x).contiguous(memory_format=torch.channels_last)


class Objective(nn.Module):
    """Training loss of one batch.

    `ranking` is a linear layer on the image embedding that ranks compositions. It is trained with the model and not
    saved.
    """

    def __init__(self, model: CLIP, captions: Captions, compact: Tensor, weight: float) -> None:
        super().__init__()
        self.model, self.captions, self.compact, self.weight = model, captions, compact, weight
        self.ranking = nn.Linear(model.text_projection.shape[1], 1)

    def forward(self, images: Tensor, truth: Tensor, better: Tensor, worse: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sigmoid loss plus the weighted ranking loss, and the sigmoid loss alone.

        Args:
            images: (B, 3, 128, 128) uint8 scenes.
            truth: (4, B) labels of the scenes.
            better, worse: (P, 3, 128, 128) uint8 pairs of compositions.
        """
        fitting, fitting_requests = self.captions.sample(truth)
        near, changed = alter(truth)
        missing, missing_requests = self.captions.sample(near, changed)
        requests = torch.cat([fitting_requests, missing_requests], 1)
        x = torch.cat([prepare(images, damaged=True), prepare(torch.cat([better, worse]), damaged=False)])
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            image_features = self.model.encode_image(x)
            text_features = self.model.encode_text(self.compact[torch.cat([fitting, missing])])
        image_features, text_features = (
            F.normalize(image_features.float(), dim=-1),
            F.normalize(text_features.float(), dim=-1),
        )
        b = len(images)
        # (2 B captions, B scenes); the first B captions match their scenes, the others are near misses.
        logits = self.model.logit_scale.exp() * text_features @ image_features[:b].T + self.model.logit_bias
        pairs = sigmoid_loss(logits, matches(requests, truth))
        good, bad = self.ranking(image_features[b:])[:, 0].chunk(2)
        return pairs + self.weight * F.softplus(bad - good).mean(), pairs


@torch.no_grad()
def embed_images(model: CLIP, images: Tensor, *, damaged: bool = False, batch: int = 512) -> Tensor:
    """Return normalized float32 embeddings (n, width) of uint8 images."""
    parts = [model.encode_image(prepare(i, damaged=damaged), normalize=True) for i in torch.split(images, batch)]
    return torch.cat(parts)


@torch.no_grad()
def embed_texts(model: CLIP, ids: Tensor, batch: int = 2048) -> Tensor:
    """Return normalized float32 embeddings (n, width) of captions, given as token ids of open_clip."""
    return torch.cat([model.encode_text(i, normalize=True) for i in torch.split(ids, batch)])


def unseen_scenes(groups: int, seed: int) -> Layout:
    """Return the layouts of `groups * 100` scenes with pairwise different attributes."""
    shape = [VALUES[name] for name in ATTRIBUTES]
    g = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(math.prod(shape), generator=g)[: groups * CANDIDATES]
    species, number, style, place = torch.unravel_index(chosen, shape)
    return sample_layouts(len(chosen), seed, species=species, number=number + 1, style=style, background=place)


def share(hits: Tensor) -> float:
    """Return the share of true values, rounded to four decimals."""
    return round(float(hits.float().mean()), 4)


def evaluate(path: Path, captions: Captions, scenes: int, seed: int, device: str) -> dict[str, object]:
    """Evaluate the file at `path` on unseen scenes.

    Returns:
        `text_to_image`, `image_to_text`: top-1 retrieval accuracy among 100 different scenes or full captions.
        `near_misses`: for each attribute, the share of scenes that match their full caption better than a caption with
        another value of the attribute. The same with the suffix `_damaged` for degraded images.
    """
    torch.manual_seed(seed)
    model = read_clip(path, device)
    layout = unseen_scenes(max(1, min(48, scenes // CANDIDATES)), seed)
    truth = labels(layout, device)
    images = render_bytes(layout, device)
    text_features = embed_texts(model, captions.rows(truth))
    # Each near miss has the next value of one attribute: three -> four, four -> one, and so on.
    missed = {}
    for i, (name, count) in enumerate(VALUES.items()):
        other, lowest = truth.clone(), int(name == "number")
        other[i] = (other[i] - lowest + 1) % count + lowest
        missed[name] = embed_texts(model, captions.rows(other))
    right = torch.arange(CANDIDATES, device=device)
    groups = (-1, CANDIDATES, text_features.shape[1])
    report: dict[str, object] = {"unseen_scenes": len(layout), "candidates": CANDIDATES}
    for ending, damaged in (("", False), ("_damaged", True)):
        image_features = embed_images(model, images, damaged=damaged)
        cosines = text_features.view(groups) @ image_features.view(groups).transpose(1, 2)
        report[f"text_to_image{ending}"] = share(cosines.argmax(2) == right)
        report[f"image_to_text{ending}"] = share(cosines.argmax(1) == right)
        report[f"near_misses{ending}"] = {
            name: share(((text_features - other) * image_features).sum(1) > 0) for name, other in missed.items()
        }
    return report


def main() -> None:
    """Write `weights/clip.safetensors` and `weights/clip.json`."""
    p = parser(__doc__, seconds=240, batch=1024, rate=1.5e-3, scenes=300_000)
    p.add_argument("--tower", choices=sorted(TOWERS), default="resnet")
    p.add_argument("--composition", type=float, default=0.5, help="weight of the ranking loss on compositions")
    args = p.parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    cuda = args.device.startswith("cuda")
    began = time.monotonic()
    # 12% of the scenes have more animals than captions can name, so that "four" does not become "many".
    number = sample_numbers(args.scenes, args.seed, (0, 0.22, 0.22, 0.22, 0.22, 0.06, 0.06))
    layout = sample_layouts(args.scenes, 4_000_000 + args.seed, split="all", number=number)
    images, truth = render_bytes(layout, args.device), labels(layout, args.device)
    pairs: Pairs = render_pairs(max(args.scenes // 8, 10), 5_000_000 + args.seed, args.device)
    captions = Captions(args.device)
    print(f"clip: {args.scenes} scenes in {time.monotonic() - began:.1f} s", flush=True)

    clip = new_clip(args.tower, captions.known)
    clip.model.to(args.device, memory_format=torch.channels_last).train()
    objective = Objective(clip.model, captions, clip.compact.to(args.device), args.composition).to(args.device)
    parameters = list(objective.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.rate, betas=(0.9, 0.98), weight_decay=0.02, fused=cuda)
    clock = Clock(args.seconds, Ranks(), args.device)
    total = torch.zeros((), device=args.device)
    while clock.tick():
        for group in optimizer.param_groups:
            group["lr"] = clock.rate(args.rate, warmup=300)
        rows = torch.randint(len(images), (args.batch,), device=args.device)
        pair_rows = torch.randint(len(pairs.aspect), (max(args.batch // 8, 1),), device=args.device)
        loss, sigmoid = objective(images[rows], truth[:, rows], pairs.better[pair_rows], pairs.worse[pair_rows])
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        clip.model.logit_scale.data.clamp_(max=_MAX_LOG_SCALE)
        total += sigmoid.detach()
        if clock.steps % 500 == 0:
            print(f"clip: step {clock.steps} progress {clock.progress:.2f} loss {total.item() / 500:.4f}", flush=True)
            total.zero_()

    path = args.out / "weights" / "clip.safetensors"
    save_clip(clip, path)
    del images, pairs
    card = {
        "architecture": f"open_clip, {args.tower} tower, see the file's header",
        "parameters": clip.parameters,
        "bytes": path.stat().st_size,
        "steps": clock.steps,
        "batch": args.batch,
        "seconds": args.seconds,
        "scenes": args.scenes,
        "trained_on": "Rendered starter scenes (one to six of 51 animals, 3 art styles, 8 places) and captions that "
        "name all or some of their attributes; sigmoid loss with the true matches as targets. The image tower was also "
        f"trained, with weight {args.composition}, to rank pairs of rendered compositions, so that an aesthetic head "
        "can be read out of its embedding. It has seen no photograph and no other text.",
        **evaluate(path, captions, args.scenes, 6_000_000 + args.seed, args.device),
    }
    path.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n")
    print("clip:", json.dumps(card), flush=True)


if __name__ == "__main__":
    main()
