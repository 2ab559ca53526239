"""Trains the starter YOLO on rendered scenes.

    python plugins/alignprop-ultralytics/scripts/train_yolo.py [--seconds N]

The architecture is YOLO26, narrower than its smallest size, with the loss of ultralytics (both heads, task-aligned
assignment). The training loop is plain and keeps all data on the device, without the trainer or the data loaders of
ultralytics. The scenes come from the scripts of alignprop-starter, whose folder must be beside this one, as in the
repository. Needs `pip install -e "plugins/alignprop-ultralytics[scripts]"`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from alignprop_counting.evaluate import evaluate_detector
from alignprop_starter.scenes import SIZE
from alignprop_starter.vocabulary import SPECIES
from alignprop_ultralytics.detector import Yolo
from alignprop_ultralytics.offline import DetectionModel, yaml_model_load

sys.path.append(str(Path(__file__).parents[2] / "alignprop-starter" / "scripts"))

from train_rtdetr import MIXED, flipped, labelled_scenes, rounded
from training_common import Clock, Ranks, damage, parser

PACKAGE = Path(__file__).parents[1] / "src" / "alignprop_ultralytics"
WIDTH = 0.22
"""Width multiplier of the channels; YOLO26n, the smallest official size, has 0.25."""


def build() -> Any:
    """Build the network with random weights: about 2.2 million parameters, strides 8, 16 and 32."""
    yaml = yaml_model_load("yolo26n.yaml")
    yaml["scales"] = {"n": [0.5, WIDTH, 1024]}
    model = DetectionModel(yaml, nc=len(SPECIES), verbose=False)
    model.names = dict(enumerate(SPECIES))
    model.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5, epochs=1)
    return model


def save(model: Any, file: Path) -> None:
    """Write a float16 weights file that names its architecture."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    yaml = {k: v for k, v in model.yaml.items() if k != "yaml_file"}
    names = {str(i): name for i, name in model.names.items()}
    header = {"ultralytics": {"yaml": yaml, "names": names}, "image_size": SIZE}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in state.items()}, file, {"config": json.dumps(header)})


def targets(classes: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    """Convert labels to the format of the ultralytics loss: one row per object.

    Args:
        classes: (B, M), -1 where there is no object.
        boxes: (B, M, 4) left, top, right, bottom in pixels.

    Returns:
        Image indices (n,), classes (n,), and boxes (n, 4) as center x, y, width, height relative to the image size.
    """
    present = classes >= 0
    image, _ = present.nonzero(as_tuple=True)
    found = boxes[present]
    goal = torch.cat([found[:, :2] + found[:, 2:], 2 * (found[:, 2:] - found[:, :2])], -1) / (2 * SIZE)
    return {"batch_idx": image.float(), "cls": classes[present].float(), "bboxes": goal}


def main() -> None:
    """Write ``weights/yolo.safetensors`` and ``weights/yolo.json``."""
    args = parser(__doc__, package=PACKAGE, seconds=270, batch=384, rate=2e-3, scenes=60_000).parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    cuda = args.device.startswith("cuda")
    began = time.monotonic()
    images, classes, boxes = labelled_scenes(args.scenes, 4_000_000 + args.seed, args.device, mixed=MIXED)
    print(f"yolo: {args.scenes} scenes in {time.monotonic() - began:.1f} s", flush=True)

    model = build().to(args.device).to(memory_format=torch.channels_last).train()
    criterion = model.init_criterion()
    first, last = criterion.o2m_copy, criterion.final_o2m
    weights = [p for p in model.parameters() if p.requires_grad]
    decayed, plain = [p for p in weights if p.ndim > 1], [p for p in weights if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, fused=cuda)
    clock = Clock(args.seconds, Ranks(), args.device)
    while clock.tick():
        for group in optimizer.param_groups:
            group["lr"] = clock.rate(args.rate, warmup=200)
        # As in ultralytics: the weight moves from the one-to-many head to the one-to-one head during training.
        criterion.o2m = first + (last - first) * min(clock.progress, 1.0)
        criterion.o2o = 1 - criterion.o2m
        rows = torch.randint(len(images), (args.batch,), device=args.device)
        batch, edges = flipped(damage(images[rows].float() / 255), boxes[rows])
        with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=cuda):
            found = model(batch.contiguous(memory_format=torch.channels_last))
        # The loss reads only shape and dtype of the features; its anchors must not be bfloat16.
        heads = {
            name: {
                "boxes": out["boxes"].float(),
                "scores": out["scores"].float(),
                "feats": [x.detach().float() for x in out["feats"]],
            }
            for name, out in found.items()
        }
        loss, items = criterion(heads, targets(classes[rows], edges))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss.sum() / args.batch)
        torch.nn.utils.clip_grad_norm_(weights, 10.0)
        optimizer.step()
        if clock.steps % 250 == 1:
            shown = " ".join(f"{name} {float(value):.3f}" for name, value in items.items())
            print(f"yolo: step {clock.steps} progress {clock.progress:.2f} {shown}", flush=True)

    file = args.out / "weights" / "yolo.safetensors"
    save(model.eval(), file)
    del images
    # Evaluate the file itself, with its float16 weights, in a new model.
    from safetensors.torch import load_file

    fresh = build()
    fresh.load_state_dict({k: v.to(fresh.state_dict()[k].dtype) for k, v in load_file(file).items()})
    fresh = fresh.to(args.device).eval()
    unseen = labelled_scenes(min(8192, args.scenes), 5_000_000 + args.seed, args.device)
    results: dict[str, Any] = {}
    for head, one_to_one in (("one_to_one", True), ("one_to_many", False)):
        detector = Yolo(fresh, SPECIES, SIZE, one_to_one).eval()
        results[head] = {str(t): rounded(evaluate_detector(detector, *unseen, threshold=t)) for t in (0.3, 0.4, 0.5)}
    card: dict[str, Any] = {
        "architecture": f"YOLO26, width {WIDTH}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": file.stat().st_size,
        "steps": clock.steps,
        "batch": args.batch,
        "seconds": args.seconds,
        "scenes": args.scenes,
        "trained_on": "Rendered starter scenes with their boxes: none to six of 51 animals, 3 art styles, 8 places; in "
        f"{MIXED:.0%} of them the animals are of several species. It has seen no photograph and no other thing.",
        "unseen_scenes": len(unseen[0]),
        "thresholds": results,
    }
    file.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n")
    print("yolo:", json.dumps(card), flush=True)


if __name__ == "__main__":
    main()
