"""Trains the starter RT-DETR on rendered scenes.

    python plugins/alignprop-starter/scripts/train_rtdetr.py [--seconds N]

The loss is that of RT-DETR (varifocal, L1 and generalized IoU after Hungarian matching, at every decoder layer and at
the encoder's proposals) in batched form: one transfer to the CPU matcher per step instead of several per image. There
are no denoising queries. Instead, an auxiliary linear layer on the encoder's feature maps classifies the animal in each
cell, from which the backbone learns the species within the first minute. It is discarded after training.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from training_common import Clock, Ranks, damage, parser
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

from alignprop_counting.evaluate import evaluate_detector
from alignprop_counting.transformers_detector import RtDetr
from alignprop_starter.scenes import MOST_ANIMALS, SIZE, Layout, load_artwork, render_layouts, sample_layouts
from alignprop_starter.vocabulary import SPECIES

QUERIES = 24
MIXED = 0.3
"""Share of training scenes with animals of several species, so that the detector classifies each animal separately."""


# -- scenes with boxes ------------------------------------------------------------------------------------------------


def labelled_scenes(
    n: int, seed: int, device: str, *, mixed: float = 0.0, chunk: int = 2048
) -> tuple[Tensor, Tensor, Tensor]:
    """Render scenes of 0 to 6 animals, with labels.

    Args:
        n: number of scenes.
        seed: the same seed gives the same scenes.
        device: device of the results.
        mixed: share of scenes with animals of several species.
        chunk: number of scenes that are rendered at once.

    Returns:
        Images (n, 3, 128, 128) uint8, classes (n, 6) int64 with -1 for absent animals, and boxes (n, 6, 4) float32
        as left, top, right, bottom in pixels.
    """
    g = torch.Generator().manual_seed(seed)
    layout = sample_layouts(n, seed, split="all", number=torch.randint(MOST_ANIMALS + 1, (n,), generator=g))
    animal = load_artwork().animal
    own = animal[layout.species, layout.style]
    slots = layout.sprite == own[:, None]  # (n, slots): objects that are animals
    species = torch.where(
        torch.rand(n, 1, generator=g) < mixed,
        torch.randint(len(SPECIES), layout.sprite.shape, generator=g),
        layout.species[:, None],
    )
    sprite = torch.where(slots, animal[species, layout.style[:, None].expand_as(species)], layout.sprite)
    layout = Layout(**{**vars(layout), "sprite": sprite})
    half = layout.size / 2
    edges = torch.stack([layout.x - half, layout.y - half, layout.x + half, layout.y + half], -1).clamp(0, SIZE)
    # Move the animals to the front and keep six of the slots: (n, 6).
    first = (~slots).long().argsort(dim=1, stable=True)[:, :MOST_ANIMALS]
    classes = species.masked_fill(~slots, -1).gather(1, first)
    boxes = edges.masked_fill(~slots[..., None], 0).gather(1, first[..., None].expand(-1, -1, 4))
    images = torch.empty(n, 3, SIZE, SIZE, dtype=torch.uint8, device=device)
    for i in range(0, n, chunk):
        images[i : i + chunk] = (render_layouts(layout[i : i + chunk], device) * 255).round().byte()
    return images, classes.to(device), boxes.to(device)


# -- model and loss ---------------------------------------------------------------------------------------------------


def configuration() -> RTDetrConfig:
    """Return the configuration of the starter RT-DETR: strides 8, 16 and 32, about 2 million parameters."""
    backbone = RTDetrResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128, 160],
        depths=[1, 2, 2, 1],
        layer_type="basic",
        hidden_act="relu",
        out_features=["stage2", "stage3", "stage4"],
    )
    return RTDetrConfig(
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,
        encoder_in_channels=[64, 128, 160],
        encoder_hidden_dim=96,
        encoder_ffn_dim=192,
        encoder_attention_heads=6,
        hidden_expansion=0.5,
        d_model=96,
        decoder_in_channels=[96, 96, 96],
        decoder_ffn_dim=192,
        decoder_layers=3,
        decoder_attention_heads=6,
        decoder_n_points=4,
        num_queries=QUERIES,
        num_denoising=0,
        id2label=dict(enumerate(SPECIES)),
        label2id={name: i for i, name in enumerate(SPECIES)},
    )


def _pairwise_giou(a: Tensor, b: Tensor) -> Tensor:
    """Return the generalized IoU of boxes (..., 4) as center, width, height; broadcasts."""
    a, b = (torch.cat([x[..., :2] - x[..., 2:] / 2, x[..., :2] + x[..., 2:] / 2], -1) for x in (a, b))
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - overlap
    return overlap / union.clamp(min=1e-9) - (hull - union) / hull.clamp(min=1e-9)


def _pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU of boxes (..., 4) as center, width, height; broadcasts."""
    a, b = (torch.cat([x[..., :2] - x[..., 2:] / 2, x[..., :2] + x[..., 2:] / 2], -1) for x in (a, b))
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - overlap
    return overlap / union.clamp(min=1e-9)


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, classes: Tensor, targets: Tensor, config: RTDetrConfig) -> Tensor:
    """Assign a query to every object, with RT-DETR's matching cost and the Hungarian algorithm.

    Args:
        logits: (L, B, Q, C) class logits of L layers and Q queries.
        boxes: (L, B, Q, 4) predicted boxes.
        classes: (B, M), -1 for absent objects; present objects come first.
        targets: (B, M, 4) true boxes.
        config: contains the weights of the costs.

    Returns:
        Index of the query for each object, (L, B, M); 0 for absent objects.
    """
    p = logits.sigmoid().gather(-1, classes.clamp(min=0)[None, :, None].expand(*logits.shape[:3], -1))
    alpha, gamma = config.matcher_alpha, config.matcher_gamma
    # Focal classification cost, L1 cost and generalized IoU cost; together (L, B, Q, M).
    kind = alpha * (1 - p) ** gamma * -(p + 1e-8).log() - (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
    place = (boxes[..., None, :] - targets[None, :, None]).abs().sum(-1)
    shape = -_pairwise_giou(boxes[..., None, :], targets[None, :, None])
    cost = config.matcher_class_cost * kind + config.matcher_bbox_cost * place + config.matcher_giou_cost * shape
    # One transfer for all layers and images.
    costs = cost.nan_to_num(1e6, 1e6, -1e6).cpu().numpy()
    numbers = (classes >= 0).sum(1).tolist()
    found = torch.zeros(*cost.shape[:2], cost.shape[-1], dtype=torch.long)
    filled = found.numpy()
    for layer in range(len(costs)):
        for i, number in enumerate(numbers):
            if number:
                queries, objects = linear_sum_assignment(costs[layer, i, :, :number])
                filled[layer, i, objects] = queries
    return found.to(logits.device)


def detection_loss(
    logits: Tensor, boxes: Tensor, classes: Tensor, targets: Tensor, config: RTDetrConfig
) -> dict[str, Tensor]:
    """Return the terms of RT-DETR's loss, summed over layers, as in `transformers.loss.loss_rt_detr`.

    The arguments are those of `match`.
    """
    query = match(logits, boxes, classes, targets, config)
    layers, batch, _ = query.shape
    present = (classes >= 0)[None].expand_as(query)
    chosen = boxes.gather(2, query[..., None].expand(-1, -1, -1, 4))
    goal = targets[None].expand(layers, -1, -1, -1)
    count = present[0].sum().clamp(min=1)
    iou = _pairwise_iou(chosen.detach(), goal)

    # Varifocal loss: the class target is the IoU of the box for matched queries, and zero for all others. Absent
    # objects add zero to query 0.
    score = torch.zeros_like(logits)
    hit = torch.zeros_like(logits)
    where = (
        torch.arange(layers, device=logits.device)[:, None, None].expand_as(query),
        torch.arange(batch, device=logits.device)[None, :, None].expand_as(query),
        query,
        classes.clamp(min=0)[None].expand_as(query),
    )
    score.index_put_(where, (iou * present).to(score.dtype), accumulate=True)
    hit.index_put_(where, present.to(hit.dtype), accumulate=True)
    weight = config.focal_loss_alpha * logits.detach().sigmoid() ** config.focal_loss_gamma * (1 - hit) + score
    vfl = F.binary_cross_entropy_with_logits(logits, score, weight=weight, reduction="sum") / count
    l1 = ((chosen - goal).abs().sum(-1) * present).sum() / count
    giou = ((1 - _pairwise_giou(chosen, goal)) * present).sum() / count
    return {
        "vfl": config.weight_loss_vfl * vfl,
        "l1": config.weight_loss_bbox * l1,
        "giou": config.weight_loss_giou * giou,
    }


class CellNames(nn.Module):
    """Auxiliary classifier of the animal in each cell of the encoder's feature maps; used in training only."""

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(width, len(SPECIES) + 1, 1) for _ in range(levels))

    def loss(self, maps: list[Tensor], classes: Tensor, boxes: Tensor) -> Tensor:
        """Return the mean cross-entropy over cells, summed over feature maps.

        Args:
            maps: (B, width, H, W) per level.
            classes: (B, M), -1 for absent objects.
            boxes: (B, M, 4) as center, width, height relative to the image size.
        """
        total = boxes.new_zeros(())
        for head, features in zip(self.heads, maps, strict=True):
            height, width = features.shape[-2:]
            x = (torch.arange(width, device=boxes.device) + 0.5) / width
            y = (torch.arange(height, device=boxes.device) + 0.5) / height
            center, size = boxes[..., :2, None, None], boxes[..., 2:, None, None]
            # (B, M, H, W). Only the inner part of the box: its corners rarely show the animal.
            inside = (((x - center[:, :, 0]) / size[:, :, 0].clamp(min=1e-6)).abs() < 0.35) & (
                ((y[:, None] - center[:, :, 1]) / size[:, :, 1].clamp(min=1e-6)).abs() < 0.35
            )
            inside &= (classes >= 0)[..., None, None]
            # Objects are ordered back to front, so the last one is visible. Class len(SPECIES) means no animal.
            order = torch.arange(1, inside.shape[1] + 1, device=boxes.device)[None, :, None, None]
            top = (inside * order).amax(1)
            padded = F.pad(classes, (1, 0), value=len(SPECIES))
            truth = padded.gather(1, top.flatten(1)).view_as(top)
            total = total + F.cross_entropy(head(features.float()), truth)
        return total


# -- training ---------------------------------------------------------------------------------------------------------


def save(model: RTDetrForObjectDetection, file: Path) -> None:
    """Write a float16 weights file that names its architecture."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    architecture = {"architecture": type(model).__name__, "config": json.loads(model.config.to_json_string())}
    header = {"transformers": architecture, "image_size": SIZE}
    file.parent.mkdir(parents=True, exist_ok=True)
    # Decoder layers share heads, so tensors occur under several names; safetensors does not store shared tensors.
    save_file({k: v.clone().contiguous() for k, v in state.items()}, file, {"config": json.dumps(header)})


def flipped(images: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Mirror half of the images (B, 3, H, W) and their boxes (B, M, 4), which are left, top, right, bottom."""
    turn = torch.rand(len(images), device=images.device) < 0.5
    images = torch.where(turn[:, None, None, None], images.flip(3), images)
    left, top, right, bottom = boxes.unbind(-1)
    mirrored = torch.stack([SIZE - right, top, SIZE - left, bottom], -1)
    return images, torch.where(turn[:, None, None], mirrored, boxes)


def main() -> None:
    """Write `weights/rtdetr.safetensors` and `weights/rtdetr.json`."""
    args = parser(__doc__, seconds=240, batch=384, rate=8e-4, scenes=60_000).parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    cuda = args.device.startswith("cuda")
    began = time.monotonic()
    images, classes, boxes = labelled_scenes(args.scenes, 4_000_000 + args.seed, args.device, mixed=MIXED)
    print(f"rtdetr: {args.scenes} scenes in {time.monotonic() - began:.1f} s", flush=True)

    config = configuration()
    model = RTDetrForObjectDetection(config).to(args.device).train()
    cells = CellNames(config.encoder_hidden_dim, config.num_feature_levels).to(args.device)
    maps: list[list[Tensor]] = []
    hook = model.model.encoder.register_forward_hook(lambda _m, _i, out: maps.append(out.last_hidden_state))
    weights = [*model.parameters(), *cells.parameters()]
    # The auxiliary classifier has ten times the learning rate, because the backbone learns from its gradient.
    groups = [{"params": [*model.parameters()], "times": 1.0}, {"params": [*cells.parameters()], "times": 10.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, weight_decay=0.02, fused=cuda)
    clock = Clock(args.seconds, Ranks(), args.device)
    while clock.tick():
        for group in optimizer.param_groups:
            group["lr"] = clock.rate(args.rate, warmup=200) * group["times"]
        rows = torch.randint(len(images), (args.batch,), device=args.device)
        batch, edges = flipped(damage(images[rows].float() / 255), boxes[rows])
        kinds = classes[rows]
        goal = torch.cat([edges[..., :2] + edges[..., 2:], 2 * (edges[..., 2:] - edges[..., :2])], -1) / (2 * SIZE)
        maps.clear()
        with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=cuda):
            out = model(pixel_values=batch)
        # (L, B, Q, ...): the encoder's proposals first, then the decoder layers.
        logits = torch.cat([out.enc_topk_logits[:, None], out.intermediate_logits], 1).transpose(0, 1).float()
        found = torch.cat([out.enc_topk_bboxes[:, None], out.intermediate_reference_points], 1).transpose(0, 1)
        losses = detection_loss(logits, found.float(), kinds, goal, config)
        losses["cells"] = cells.loss(maps[0], kinds, goal)
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if clock.steps % 250 == 1:
            shown = " ".join(f"{name} {value.item():.3f}" for name, value in losses.items())
            print(f"rtdetr: step {clock.steps} progress {clock.progress:.2f} {shown}", flush=True)
    hook.remove()

    file = args.out / "weights" / "rtdetr.safetensors"
    save(model.eval(), file)
    del images
    # Evaluate the file itself, with its float16 weights, in a new model.
    from safetensors.torch import load_file

    fresh = RTDetrForObjectDetection(config)
    fresh.load_state_dict({k: v.to(fresh.state_dict()[k].dtype) for k, v in load_file(file).items()})
    detector = RtDetr(fresh.to(args.device), SIZE).eval()
    unseen = labelled_scenes(min(8192, args.scenes), 5_000_000 + args.seed, args.device)
    card = {
        "architecture": "RTDetrForObjectDetection",
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": file.stat().st_size,
        "steps": clock.steps,
        "batch": args.batch,
        "seconds": args.seconds,
        "scenes": args.scenes,
        "trained_on": "Rendered starter scenes with their boxes: none to six of 51 animals, 3 art styles, 8 places; in "
        f"{MIXED:.0%} of them the animals are of several species. It has seen no photograph and no other thing.",
        "unseen_scenes": len(unseen[0]),
        "thresholds": {str(t): rounded(evaluate_detector(detector, *unseen, threshold=t)) for t in (0.3, 0.4, 0.5)},
    }
    file.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n")
    print("rtdetr:", json.dumps(card), flush=True)


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Return the values rounded to four decimals."""
    return {name: round(value, 4) for name, value in values.items()}


if __name__ == "__main__":
    main()
