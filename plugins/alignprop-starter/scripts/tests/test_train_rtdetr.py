"""The training script of the starter's RT-DETR: its scenes, its loss (that of transformers), and its output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("alignprop_counting", reason="alignprop-counting is not installed")
pytest.importorskip("scipy", reason="scipy is not installed: alignprop-starter[scripts]")

import train_rtdetr as training

from alignprop_counting.loading import transformers_detector


def test_labels_match_the_animals() -> None:
    images, classes, boxes = training.labelled_scenes(64, 3, "cpu")
    numbers = (classes >= 0).sum(1)
    assert set(numbers.tolist()) == set(range(7))
    assert ((classes >= 0) == (boxes[..., 2] > boxes[..., 0])).all()
    for row, number in zip(classes, numbers, strict=True):
        assert len(set(row[:number].tolist())) <= 1
    mixed = training.labelled_scenes(64, 3, "cpu", mixed=1.0)
    assert torch.equal((mixed[1] >= 0), (classes >= 0))
    assert any(len(set(row[row >= 0].tolist())) > 1 for row in mixed[1])
    # Other species in the same places: pixels change inside the boxes only.
    inside = torch.zeros(64, 128, 128, dtype=torch.bool)
    for scene, row in zip(inside, boxes, strict=True):
        for left, top, right, bottom in row.tolist():
            scene[int(top) : int(bottom) + 2, int(left) : int(right) + 2] = True
    changed = (images != mixed[0]).any(1)
    assert changed.any()
    assert not (changed & ~inside).any()


def test_the_loss_equals_that_of_transformers() -> None:
    torch.manual_seed(0)
    config = training.configuration()
    model = training.RTDetrForObjectDetection(config).train()
    images, classes, edges = training.labelled_scenes(6, 5, "cpu", mixed=0.5)
    boxes = torch.cat([edges[..., :2] + edges[..., 2:], 2 * (edges[..., 2:] - edges[..., :2])], -1) / 256
    present = classes >= 0
    labels = [{"class_labels": c[p], "boxes": b[p]} for c, b, p in zip(classes, boxes, present, strict=True)]
    out = model(pixel_values=images.float() / 255, labels=labels)
    logits = torch.cat([out.enc_topk_logits[:, None], out.intermediate_logits], 1).transpose(0, 1)
    found = torch.cat([out.enc_topk_bboxes[:, None], out.intermediate_reference_points], 1).transpose(0, 1)
    losses = training.detection_loss(logits, found, classes, boxes, config)
    assert float(sum(losses.values()).detach()) == pytest.approx(float(out.loss.detach()), rel=1e-5)
    for name, key in (("vfl", "loss_vfl"), ("l1", "loss_bbox"), ("giou", "loss_giou")):
        parts = [float(value.detach()) for label, value in out.loss_dict.items() if label.startswith(key)]
        assert float(losses[name].detach()) == pytest.approx(sum(parts), rel=1e-5)


@pytest.mark.slow
def test_the_script_writes_a_loadable_file_and_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--seconds", "1", "--scenes", "16", "--batch", "4", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["train_rtdetr", *options])
    training.main()
    detector = transformers_detector("rtdetr", tmp_path / "weights" / "rtdetr.safetensors", None)
    assert (len(detector.names), detector.image_size) == (51, 128)
    card = json.loads((tmp_path / "weights" / "rtdetr.json").read_text())
    assert card["bytes"] < 5e6
    assert set(card["thresholds"]["0.5"]) == {
        "map50",
        "hard_count_right",
        "soft_hard_difference",
        "soft_count_error",
    }
