"""A faster way to take training steps on a GPU: flat bfloat16 weights, every kernel of a step replayed from two CUDA
graphs, and (on request) Muon for the matrices.

At this size a step is thousands of small kernels, and launching them takes longer than running them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from alignprop_starter.make.common import Ranks

if TYPE_CHECKING:
    from alignprop_starter.make.train_unet import Denoising


class FlatWeights:
    """All weights of some modules in one float32 vector, with a bfloat16 copy that the modules compute with.

    The modules' parameters and gradients become views of flat buffers, so that averaging over GPUs, clipping, AdamW
    and the running average are a handful of kernels. Convolutions keep channels-last weights.
    """

    def __init__(self, modules: list[torch.nn.Module], dtype: torch.dtype, device: str) -> None:
        self.parameters = [p for module in modules for p in module.parameters()]
        count = sum(p.numel() for p in self.parameters)
        self.master = torch.empty(count, device=device)
        self.working = torch.empty(count, device=device, dtype=dtype)
        self.gradient = torch.zeros(count, device=device, dtype=dtype)
        self.gradient32 = torch.zeros(count, device=device)
        for p, view in zip(self.parameters, self.views(self.master), strict=True):
            view.copy_(p.detach())
        self.working.copy_(self.master)
        for p, work, grad in zip(self.parameters, self.views(self.working), self.views(self.gradient), strict=True):
            p.data = work
            p.grad = grad
        self.average = self.master.clone()
        self.first, self.second = torch.zeros_like(self.master), torch.zeros_like(self.master)
        self.steps = torch.zeros((), device=device)
        self.matrices: dict[tuple[int, int], list[int]] = {}

    def views(self, flat: Tensor) -> list[Tensor]:
        """The vector cut into the parameters' shapes."""
        out, start = [], 0
        for p in self.parameters:
            piece = flat[start : start + p.numel()]
            start += p.numel()
            if p.ndim == 4:
                o, i, h, w = p.shape
                out.append(piece.view(o, h, w, i).permute(0, 3, 1, 2))
            else:
                out.append(piece.view(p.shape))
        return out

    def use_muon(self, embeddings: set[int], smallest: int = 24) -> None:
        """Let Muon update the matrices from now on, convolutions as (out, in * height * width), embeddings excepted
        (by `id`); vectors, embeddings and very narrow matrices stay with AdamW."""
        start = 0
        for p in self.parameters:
            shape = (p.shape[0], p[0].numel()) if p.ndim > 1 else (1, 1)
            if min(shape) >= smallest and id(p) not in embeddings:
                self.matrices.setdefault(shape, []).append(start)
            start += p.numel()

    def _orthogonalized(self, g: Tensor, momentum: float) -> list[tuple[int, Tensor]]:
        """Muon's directions (Jordan et al. 2024): momentum made orthogonal by five Newton-Schulz steps, scaled to the
        size AdamW's steps have (Liu et al. 2025, arXiv:2502.16982). All matrices of one shape at once."""
        found = []
        for (rows, columns), starts in self.matrices.items():
            pieces = [slice(s, s + rows * columns) for s in starts]
            stacked = torch.stack([torch.lerp(g[i], self.first[i], momentum) for i in pieces])
            x = stacked.view(-1, rows, columns).to(torch.bfloat16 if g.is_cuda else torch.float32)
            flat = rows > columns
            x = x.mT if flat else x
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                a = x @ x.mT
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
            x = (x.mT if flat else x) * (0.2 * max(rows, columns) ** 0.5)
            found += list(zip(starts, x.reshape(len(starts), -1), strict=True))
        return found

    def update(
        self, rate: Tensor, beta1: float = 0.9, beta2: float = 0.99, decay: float = 0.01, keep: float = 0.9993
    ) -> None:
        """One step of AdamW (and Muon) from `gradient32`, clipped to norm 1, and one of the running average; nothing
        waits for the host."""
        g = self.gradient32
        g.mul_((1.0 / (g.norm() + 1e-6)).clamp(max=1.0))
        self.steps += 1
        self.first.lerp_(g, 1 - beta1)
        self.second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        spread = (self.second / (1 - beta2**self.steps)).sqrt_().add_(1e-8)
        direction = self.first / spread / (1 - beta1**self.steps)
        for start, matrix in self._orthogonalized(g, beta1):
            direction[start : start + matrix.numel()] = matrix
        self.master.mul_(1 - rate * decay).sub_(direction * rate)
        self.working.copy_(self.master)
        self.average.lerp_(self.master, 1 - keep)


class GraphedSteps:
    """Training steps in two halves, gradient and update, each one CUDA graph (plain calls where there is no GPU)."""

    def __init__(
        self,
        loss: Denoising,
        unet: UNet2DConditionModel,
        text: CLIPTextModel,
        ranks: Ranks,
        *,
        device: str,
        compiled: bool = False,
        muon: bool = False,
    ) -> None:
        self.loss, self.unet, self.text, self.ranks = loss, unet, text, ranks
        self.forward: Callable[..., Any] = torch.compile(unet) if compiled else unet
        cuda = device.startswith("cuda")
        self.dtype = torch.bfloat16 if cuda else torch.float32
        self.weights = FlatWeights([unet, text], self.dtype, device)
        if muon:
            self.weights.use_muon(
                {id(p) for m in text.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
            )
        self.rate, self.total = torch.zeros((), device=device), torch.zeros((), device=device)
        self.halves: Sequence[Callable[[], None]] = self._capture() if cuda else (self._gradient, self._update)

    def _gradient(self) -> None:
        self.weights.gradient.zero_()
        loss = self.loss(self.forward, self.text, self.dtype)
        torch.autograd.backward(loss)
        self.weights.gradient32.copy_(self.weights.gradient)
        self.total += loss.detach()

    @torch.no_grad()
    def _update(self) -> None:
        self.weights.update(self.rate)

    def _capture(self) -> list[Callable[[], None]]:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(4):
                self._gradient()
                self._update()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        replays: list[Callable[[], None]] = []
        for half in (self._gradient, self._update):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                half()
            replays.append(graph.replay)
        # The rate was zero so far: only the moments have moved, on each rank by its own gradients.
        for moved in (self.weights.first, self.weights.second, self.weights.steps, self.total):
            moved.zero_()
        torch.cuda.synchronize()
        return replays

    def step(self, rate: float) -> None:
        """Gradient, average over ranks, update."""
        self.rate.fill_(rate)
        self.halves[0]()
        self.ranks.average([self.weights.gradient32])
        self.halves[1]()

    def averaged_models(self) -> tuple[UNet2DConditionModel, CLIPTextModel]:
        """Copies with the running average of the weights."""
        from alignprop_starter.make.train_unet import models_with

        return models_with(self.unet, self.text, self.weights.views(self.weights.average))
