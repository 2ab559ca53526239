"""How a sampler's networks run: what is in memory at a time, what is captured, and what a training step costs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from alignprop_core.config.model import BackpropConfig
from alignprop_core.diffusion.calls import NetworkCalls
from alignprop_core.diffusion.captured import CapturedDenoiser, Denoisers
from alignprop_core.diffusion.compiling import CompiledBlocks
from alignprop_core.diffusion.costs import Costs, seconds_of
from alignprop_core.diffusion.cpu import Forwards
from alignprop_core.diffusion.cuda_graphs import Pool
from alignprop_core.diffusion.decoder import Decoder
from alignprop_core.diffusion.denoiser import Batch, Denoiser
from alignprop_core.diffusion.families.base import Conditioning, Family
from alignprop_core.diffusion.memory import Memory

Example = Callable[[int], tuple[Tensor, Tensor, Conditioning]]
"""Number of samples -> latents (B, C, h, w), a timestep (0-dim) and encoded prompts of their shapes; the values do not
matter."""


class Engine:
    """Runs a family's networks for the sampler.

    Args:
        family: the networks.
        backprop: the `backprop` section of the run config.
        example: inputs for measurements and captures.

    Attributes:
        calls: the networks' calls.
        memory: what is recomputed, and how many samples are computed at a time.
        denoisers: the denoiser for batches of every shape.
        decoder: the decoder.
    """

    def __init__(self, family: Family, backprop: BackpropConfig, example: Example) -> None:
        self.calls = NetworkCalls(family)
        self._backprop, self._example = backprop, example
        self.memory = Memory(self.calls, backprop, {"denoiser": self._one_step, "decoder": self._one_image})
        self._blocks = CompiledBlocks()
        self.use(Pool(self.calls.device.type == "cuda" and backprop.cuda_graphs, self.calls.device))

    def use(self, pool: Pool) -> None:
        """Capture calls in a pool."""
        self.pool = pool
        self.denoisers = Denoisers(self.calls, pool)
        self.decoder = Decoder(self.calls, pool, self.memory)

    def capture(self, denoiser: Denoiser, samples: int) -> None:
        """Capture what training on this many samples calls, if it is not captured yet."""
        if not isinstance(denoiser, CapturedDenoiser):
            return
        latents, timestep, _ = self._example(samples)
        with self._blocks.active():
            denoiser.capture(
                [*self.decoder.not_captured(self.decoded_at_once(latents)), *denoiser.not_captured(latents, timestep)]
            )

    def decoded_at_once(self, latents: Tensor) -> Tensor:
        """Return latents (b, C, h, w) of the shape that is decoded at a time, for a batch's latents (B, C, h, w)."""
        rows = len(latents) * (1 + self._backprop.lv_samples)
        images = min(rows, self.memory.level(len(latents)).images or rows)
        return latents[:1].repeat(images, 1, 1, 1)

    def compile(self) -> None:
        """Compile the denoiser's blocks, when the calls of a batch are captured next (`costs`, `capture`)."""
        self._blocks = CompiledBlocks(self.calls.family.denoiser)
        self.release()

    def release(self) -> None:
        """Free the CUDA graphs and their memory; they are captured again when they are needed."""
        if self.calls.device.type == "cuda":
            self.pool.clear()

    def costs(self, batch: int, kept: float, *, steps: int, regularization: bool) -> Costs:
        """Capture the calls of a batch, time those of the denoiser, and predict a step's costs; on CUDA only.

        Args:
            batch: number of samples.
            kept: mean number of steps that keep their gradient.
            steps: denoising steps.
            regularization: whether kept steps call the base model as well.
        """
        level, device = self.memory.level(batch), self.calls.device
        latents, timestep, conditioning = self._example(level.samples)
        # LV samples are one more step each, with a gradient; regularization calls the base model at the kept steps.
        graphs = kept + self._backprop.lv_samples
        stores = level.samples * graphs <= level.graphs
        inputs = Batch(conditioning, self.calls.weights_of(self.calls.family.denoiser))
        denoiser = self.denoisers.of(inputs, captured=not stores)
        self.capture(denoiser, level.samples)
        predict = seconds_of(lambda: denoiser.predict(latents, timestep), device)
        vjp = seconds_of(lambda: denoiser.vjp(latents, timestep, latents, at_input=True), device)
        calls = steps + self._backprop.lv_samples - (graphs if stores else 0)
        seconds = calls * predict + graphs * vjp + (kept * (predict + vjp) if regularization else 0.0)
        torch.cuda.empty_cache()
        peak = torch.cuda.memory_reserved(device)  # graphs have their memory already
        if stores or not self.pool.enabled:
            peak = self.memory.static + int(level.peak * (graphs if stores else 1))
        return Costs(seconds=-(-batch // level.samples) * seconds, peak_memory=peak, level=str(level))

    def _one_step(self, recomputes: bool) -> tuple[Tensor, list[Tensor], Forwards]:
        """Call the denoiser for one sample, with a graph."""
        family, (latents, timestep, conditioning) = self.calls.family, self._example(1)
        family.checkpoint_denoiser(recomputes)
        # On a CPU with the layers' own forwards, which store a little more than the cheaper ones.
        forwards = self.calls.forwards_of(family.denoiser) if self.calls.device.type == "cuda" else {}
        inputs = latents.requires_grad_(), timestep
        output = self.calls.run(family.predict, *inputs, conditioning=conditioning, forwards=forwards)
        return output, [latents, *(p for p in family.denoiser.parameters() if p.requires_grad)], forwards

    def _one_image(self, recomputes: bool) -> tuple[Tensor, list[Tensor], Forwards]:
        """Decode one image, with a graph."""
        latents = self._example(1)[0].requires_grad_()
        return self.decoder.pixels(latents, recomputes), [latents], {}
