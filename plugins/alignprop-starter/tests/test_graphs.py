"""The fast training steps: what Muon moves, and how far."""

from __future__ import annotations

import torch
from torch import nn

from alignprop_starter.make.graphs import FlatWeights


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


def test_muon_moves_matrices_along_all_their_directions_alike() -> None:
    moved = _moved(muon=True)
    for name in ("conv.weight", "tall.weight", "wide.weight"):
        change = moved[name].flatten(1)
        spread = torch.linalg.svdvals(change) / (0.2 * max(change.shape) ** 0.5)
        assert spread.min() > 0.6
        assert spread.max() < 1.3


def test_muon_leaves_vectors_embeddings_and_narrow_matrices_to_adamw() -> None:
    with_muon, without = _moved(muon=True), _moved(muon=False)
    for name in ("names.weight", "conv.bias", "narrow.weight", "narrow.bias"):
        torch.testing.assert_close(with_muon[name], without[name])
    assert not torch.allclose(with_muon["tall.weight"], without["tall.weight"])
