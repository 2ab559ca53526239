"""Trains the preference model that the reward `hpsv2` loads.

    python plugins/alignprop-starter/scripts/train_preference.py [--seconds N]

Starts from `weights/clip.safetensors`. As in HPSv2 (arXiv:2306.09341, eq. 1), the loss is a softmax over the scaled
cosine similarities of one caption with two images. The preferred image matches the caption; the other one differs in
one attribute that the caption names. The sigmoid loss of `train_clip.py` over the batch keeps scores comparable between
captions.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from clip_captions import ATTRIBUTES, Captions, alter, labels, matches
from clip_files import read_clip, read_for_training, save_clip
from open_clip import CLIP
from torch import Tensor, nn
from train_clip import (
    embed_images,
    embed_texts,
    prepare,
    render_bytes,
    sample_numbers,
    share,
    sigmoid_loss,
)
from training_common import Clock, Ranks, parser

from alignprop_starter.scenes import sample_layouts

_NUMBER = ATTRIBUTES.index("number")
_MAX_LOG_SCALE = math.log(100)


@dataclass(frozen=True)
class Choices:
    """Pairs of scenes that differ in one attribute.

    Attributes:
        images: (2, n, 3, 128, 128) uint8, the scenes and their changed counterparts.
        truth: (2, 4, n) labels of both.
        changed: (n,) index of the changed attribute.
    """

    images: Tensor
    truth: Tensor
    changed: Tensor


def render_choices(n: int, seed: int, device: str) -> Choices:
    """Render `n` pairs of scenes whose labels differ in one attribute; their layouts are independent.

    The first scene has one to four animals. If the number changes, the second one has zero, five or six animals with a
    probability of 20%, else another number from one to four.
    """
    first = sample_layouts(n, seed, split="all", number=sample_numbers(n, seed + 3, (0, 1, 1, 1, 1)))
    g = torch.Generator().manual_seed(seed + 1)
    other, changed = alter(labels(first, "cpu"), g)
    far = torch.tensor([0, 5, 6])[torch.randint(3, (n,), generator=g)]
    other[_NUMBER] = torch.where((changed == _NUMBER) & (torch.rand(n, generator=g) < 0.2), far, other[_NUMBER])
    species, number, style, place = other
    second = sample_layouts(n, seed + 2, species=species, number=number, style=style, background=place)
    images = torch.empty(2, n, 3, 128, 128, dtype=torch.uint8, device=device)
    for side, layout in enumerate((first, second)):
        images[side] = render_bytes(layout, device)
    return Choices(
        images,
        torch.stack([labels(first, device), labels(second, device)]),
        changed.to(device),
    )


class Objective(nn.Module):
    """Training loss of one batch of pairs."""

    def __init__(self, model: CLIP, captions: Captions, compact: Tensor, weight: float) -> None:
        super().__init__()
        self.model, self.captions, self.compact, self.weight = model, captions, compact, weight

    def forward(self, images: Tensor, truth: Tensor, changed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the preference loss plus the weighted sigmoid loss, and the preference loss alone.

        Args:
            images, truth, changed: a batch of B pairs, see `Choices`.
        """
        ids, requests = self.captions.sample(truth[0], changed)
        x = prepare(images.flatten(0, 1), damaged=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            image_features, text_features = self.model.encode_image(x), self.model.encode_text(self.compact[ids])
        image_features, text_features = (
            F.normalize(image_features.float(), dim=-1),
            F.normalize(text_features.float(), dim=-1),
        )
        scale = self.model.logit_scale.exp()
        good, bad = image_features.chunk(2)
        preference = F.softplus(scale * (text_features * (bad - good)).sum(1)).mean()
        # (B captions, 2 B scenes): every caption with every scene, true matches as targets.
        logits = scale * text_features @ image_features.T + self.model.logit_bias
        everything = matches(requests, torch.cat([truth[0], truth[1]], 1))
        return preference + self.weight * sigmoid_loss(logits, everything), preference


def evaluate(path: Path, captions: Captions, n: int, seed: int, device: str) -> dict[str, object]:
    """Return the accuracy of the file at `path` on `n` unseen pairs, per changed attribute and over all.

    Returns:
        `full`: with full captions; `open`: with captions that omit attributes; `damaged`: with full captions and
        degraded images.
    """
    torch.manual_seed(seed)
    model = read_clip(path, device)
    choices = render_choices(n, seed, device)
    loose, _ = captions.sample(choices.truth[0], choices.changed)
    full = captions.rows(choices.truth[0])
    report: dict[str, object] = {"unseen_pairs": n}
    for name, ids, damaged in (("full", full, False), ("open", loose, False), ("damaged", full, True)):
        text_features = embed_texts(model, ids)
        good, bad = (embed_images(model, images, damaged=damaged) for images in choices.images)
        right = (text_features * (good - bad)).sum(1) > 0
        shares = {a: share(right[choices.changed == i]) for i, a in enumerate(ATTRIBUTES)}
        report[name] = shares | {"all": share(right)}
    return report


def main() -> None:
    """Write `weights/hpsv2.safetensors` and `weights/hpsv2.json`."""
    p = parser(__doc__, seconds=180, batch=512, rate=5e-4, scenes=150_000)
    p.add_argument("--sigmoid", type=float, default=0.2, help="weight of the sigmoid loss over the batch")
    args = p.parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    cuda = args.device.startswith("cuda")
    folder = args.out / "weights"
    clip = read_for_training(folder / "clip.safetensors")
    began = time.monotonic()
    choices = render_choices(args.scenes, 7_000_000 + args.seed, args.device)
    captions = Captions(args.device)
    print(f"hpsv2: {args.scenes} pairs in {time.monotonic() - began:.1f} s", flush=True)

    clip.model.to(args.device, memory_format=torch.channels_last).train()
    objective = Objective(clip.model, captions, clip.compact.to(args.device), args.sigmoid)
    parameters = list(clip.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.rate, betas=(0.9, 0.98), weight_decay=0.02, fused=cuda)
    clock = Clock(args.seconds, Ranks(), args.device)
    total = torch.zeros((), device=args.device)
    while clock.tick():
        for group in optimizer.param_groups:
            group["lr"] = clock.rate(args.rate, warmup=200)
        rows = torch.randint(len(choices.changed), (args.batch,), device=args.device)
        loss, preference = objective(choices.images[:, rows], choices.truth[:, :, rows], choices.changed[rows])
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        clip.model.logit_scale.data.clamp_(max=_MAX_LOG_SCALE)
        total += preference.detach()
        if clock.steps % 500 == 0:
            print(f"hpsv2: step {clock.steps} progress {clock.progress:.2f} loss {total.item() / 500:.5f}", flush=True)
            total.zero_()

    path = folder / "hpsv2.safetensors"
    save_clip(clip, path)
    del choices
    card = {
        "architecture": "as clip.safetensors, see the file's header",
        "parameters": clip.parameters,
        "bytes": path.stat().st_size,
        "steps": clock.steps,
        "batch": args.batch,
        "seconds": args.seconds,
        "pairs": args.scenes,
        "trained_on": "Pairs of rendered starter scenes: a caption, an image that matches it, and one that differs in "
        "the number, species, style or background that the caption names. Training started from clip.safetensors. No "
        "human preferences were used: the model scores whether an image matches its caption, not whether people like "
        "it.",
        **evaluate(path, captions, min(8192, args.scenes), 8_000_000 + args.seed, args.device),
    }
    path.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n")
    print("hpsv2:", json.dumps(card), flush=True)


if __name__ == "__main__":
    main()
