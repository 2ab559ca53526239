"""The fast training steps: what Muon updates and by how much, and agreement with plain steps."""

from __future__ import annotations

from typing import Any

import torch
from cuda_graphs import FlatWeights, GraphedSteps
from denoising import Captions, Denoising, models_with
from torch import nn
from train_unet import PlainSteps
from training_common import Ranks


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.names = nn.Embedding(40, 32)
        self.conv = nn.Conv2d(32, 48, 3)
        self.tall, self.wide = nn.Linear(32, 96, bias=False), nn.Linear(96, 32, bias=False)
        self.narrow = nn.Linear(96, 4)


def _moved(*, muon: bool, rate: float = 1e-2) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    net = _Net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    flat = FlatWeights([net], torch.float32, "cpu")
    if muon:
        flat.use_muon({id(net.names.weight)})
    flat.gradient32.copy_(torch.randn(flat.gradient32.shape, generator=torch.Generator().manual_seed(1)))
    flat.update(torch.tensor(rate), decay=0.0)
    return {name: (p.detach() - before[name]) / rate for name, p in net.named_parameters()}


def test_muon_updates_matrices_equally_in_all_directions() -> None:
    moved = _moved(muon=True)
    for name in ("conv.weight", "tall.weight", "wide.weight"):
        change = moved[name].flatten(1)
        singular_values = torch.linalg.svdvals(change) / (0.2 * max(change.shape) ** 0.5)
        assert singular_values.min() > 0.6
        assert singular_values.max() < 1.3


def test_vectors_embeddings_and_narrow_matrices_keep_adamw() -> None:
    with_muon, without = _moved(muon=True), _moved(muon=False)
    for name in ("names.weight", "conv.bias", "narrow.weight", "narrow.bias"):
        torch.testing.assert_close(with_muon[name], without[name])
    assert not torch.allclose(with_muon["tall.weight"], without["tall.weight"])


def test_graphed_steps_equal_plain_steps(pipe: Any) -> None:
    latents, labels = torch.randn(4, 8, 16, 16), torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4], [0, 1, 2, 0], [0, 1, 2, 3]])
    weights = [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]
    loss = Denoising(Captions(pipe.tokenizer, "cpu"), latents, labels, batch=2, skew=0.67, device="cpu")
    moved = []
    for make in (PlainSteps, GraphedSteps):
        unet, text = models_with(pipe.unet, pipe.text_encoder, weights)
        options = {"compiled": False} if make is PlainSteps else {}
        steps: Any = make(loss, unet, text, Ranks(), device="cpu", **options)
        torch.manual_seed(0)
        for _ in range(2):
            steps.step(1e-4)
        moved.append(torch.cat([p.detach().flatten() for m in (unet, text) for p in m.parameters()]))
    start = torch.cat([p.detach().flatten() for p in weights])
    assert (moved[0] - start).norm() > 0
    assert (moved[0] - moved[1]).norm() <= 1e-3 * (moved[0] - start).norm()
