"""Fast training steps on a GPU: flat bfloat16 weights, two CUDA graphs per step, and optionally the Muon optimizer.

A step of a model this small consists of thousands of small kernels, and launching them takes longer than running them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from denoising import Denoising, models_with
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from training_common import Ranks
from transformers import CLIPTextModel


class FlatWeights:
    """All weights of several modules in one float32 vector, with a bfloat16 copy for the forward and backward passes.

    Parameters and gradients of the modules become views of flat buffers, so that averaging over GPUs, clipping, AdamW
    and the running average (EMA) need only a few kernels. Convolution weights are stored channels-last.
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
        """Return views of a flat vector in the shapes of the parameters."""
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
        """Update matrices with Muon from now on; vectors, embeddings and narrow matrices keep AdamW.

        Args:
            embeddings: `id`s of parameters that keep AdamW.
            smallest: minimum number of rows and columns; a convolution counts as (out, in * height * width).
        """
        start = 0
        for p in self.parameters:
            shape = (p.shape[0], p[0].numel()) if p.ndim > 1 else (1, 1)
            if min(shape) >= smallest and id(p) not in embeddings:
                self.matrices.setdefault(shape, []).append(start)
            start += p.numel()

    def _orthogonalized(self, g: Tensor, momentum: float) -> list[tuple[int, Tensor]]:
        """Return Muon's update directions as (offset, flat matrix) pairs.

        Five Newton-Schulz iterations orthogonalize the momentum (Jordan et al. 2024). The result is scaled to the RMS
        of AdamW's updates (Liu et al. 2025, arXiv:2502.16982). Matrices of the same shape are processed as one batch.
        """
        found = []
        for (rows, columns), starts in self.matrices.items():
            pieces = [slice(s, s + rows * columns) for s in starts]
            stacked = torch.stack([torch.lerp(g[i], self.first[i], momentum) for i in pieces])
            x = stacked.view(-1, rows, columns).to(torch.bfloat16 if g.is_cuda else torch.float32)
            # x @ x.mT is smallest if the matrix has fewer rows than columns.
            tall = rows > columns
            x = x.mT if tall else x
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                a = x @ x.mT
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
            x = (x.mT if tall else x) * (0.2 * max(rows, columns) ** 0.5)
            found += list(zip(starts, x.reshape(len(starts), -1), strict=True))
        return found

    def update(
        self, rate: Tensor, beta1: float = 0.9, beta2: float = 0.99, decay: float = 0.01, keep: float = 0.9993
    ) -> None:
        """Take one optimizer step from `gradient32`, clipped to norm 1, and update the running average.

        No host synchronization, so that it can be captured in a CUDA graph.
        """
        g = self.gradient32
        g.mul_((1.0 / (g.norm() + 1e-6)).clamp(max=1.0))
        self.steps += 1
        self.first.lerp_(g, 1 - beta1)
        self.second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        scale = (self.second / (1 - beta2**self.steps)).sqrt_().add_(1e-8)
        direction = self.first / scale / (1 - beta1**self.steps)
        for start, matrix in self._orthogonalized(g, beta1):
            direction[start : start + matrix.numel()] = matrix
        self.master.mul_(1 - rate * decay).sub_(direction * rate)
        self.working.copy_(self.master)
        self.average.lerp_(self.master, 1 - keep)


class GraphedSteps:
    """Training steps in two parts, gradient and update, with one CUDA graph each; plain calls on a CPU.

    The gradient is averaged over processes between both parts, outside the graphs.
    """

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
        self.parts: Sequence[Callable[[], None]] = self._capture() if cuda else (self._gradient, self._update)

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
        # Warm-up on a side stream, as CUDA graph capture requires.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(4):
                self._gradient()
                self._update()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        replays: list[Callable[[], None]] = []
        for part in (self._gradient, self._update):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                part()
            replays.append(graph.replay)
        # The learning rate was zero, so the weights are unchanged. The optimizer state is not, and it differs by rank.
        for state in (self.weights.first, self.weights.second, self.weights.steps, self.total):
            state.zero_()
        torch.cuda.synchronize()
        return replays

    def step(self, rate: float) -> None:
        """Take one optimizer step with learning rate `rate`."""
        self.rate.fill_(rate)
        self.parts[0]()
        self.ranks.average([self.weights.gradient32])
        self.parts[1]()

    def averaged_models(self) -> tuple[UNet2DConditionModel, CLIPTextModel]:
        """Return copies of both models with the averaged weights."""
        return models_with(self.unet, self.text, self.weights.views(self.weights.average))
