"""A faster way to take training steps on a GPU: flat bfloat16 weights, every kernel of a step replayed from two CUDA
graphs.

At this size a step is about a thousand small kernels, and launching them takes longer than running them;
torch.compile helps, but needs over a minute before the first step. Checked on the CPU (without graphs) against plain
autograd and AdamW; not yet timed on a GPU, and the shipped weights were not made with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
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

    def update(
        self, rate: Tensor, beta1: float = 0.9, beta2: float = 0.99, decay: float = 0.01, keep: float = 0.999
    ) -> None:
        """One AdamW step from `gradient32`, clipped to norm 1, and one of the running average; nothing waits for the
        host."""
        g = self.gradient32
        g.mul_((1.0 / (g.norm() + 1e-6)).clamp(max=1.0))
        self.steps += 1
        self.first.lerp_(g, 1 - beta1)
        self.second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        spread = (self.second / (1 - beta2**self.steps)).sqrt_().add_(1e-8)
        self.master.mul_(1 - rate * decay).sub_(self.first / spread * (rate / (1 - beta1**self.steps)))
        self.working.copy_(self.master)
        self.average.lerp_(self.master, 1 - keep)


class GraphedSteps:
    """Training steps in two halves, gradient and update, each one CUDA graph (plain calls where there is no GPU)."""

    def __init__(
        self, loss: Denoising, unet: UNet2DConditionModel, text: CLIPTextModel, ranks: Ranks, *, device: str
    ) -> None:
        self.loss, self.unet, self.text, self.ranks = loss, unet, text, ranks
        cuda = device.startswith("cuda")
        self.dtype = torch.bfloat16 if cuda else torch.float32
        self.weights = FlatWeights([unet, text], self.dtype, device)
        self.rate, self.total = torch.zeros((), device=device), torch.zeros((), device=device)
        self.halves: Sequence[Callable[[], None]] = self._capture() if cuda else (self._gradient, self._update)

    def _gradient(self) -> None:
        self.weights.gradient.zero_()
        loss = self.loss(self.unet, self.text, self.dtype)
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
