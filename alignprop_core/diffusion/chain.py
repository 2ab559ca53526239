"""The chain of denoising steps: from noise to final latents, recording what the backward pass needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignprop_core.diffusion.calls import NetworkCalls
from alignprop_core.diffusion.captured import CapturedDenoiser, Denoisers
from alignprop_core.diffusion.denoiser import Batch, Denoiser
from alignprop_core.diffusion.families.base import Conditioning
from alignprop_core.diffusion.noise import Noise
from alignprop_core.diffusion.schedulers import Scheduler, State
from alignprop_core.diffusion.truncation import Truncation
from alignprop_core.lora import adapters


@dataclass
class Record:
    """One denoising step as it was sampled; no tensor has a graph except in `graph`.

    Attributes:
        number: the step; 0 is the noisiest.
        timestep: 0-dim, the network's time at this step.
        latents: (B, C, h, w), before the step.
        prediction: (B, C, h, w), the network's guided output at these latents.
        state: the scheduler's state before the step.
        noise: (B, C, h, w), the noise that the step adds; None if it adds none.
        kept: whether the network call keeps its gradient.
        output_weight: factor on the gradient that reaches the prediction from the following steps.
        input_scale: factor on the gradient that goes from the prediction to the network's input.
        base: (B, C, h, w), the base model's prediction at these latents; only with regularization.
        graph: the network's input and output with the graph in between, if it is stored for the backward pass.
    """

    number: int
    timestep: Tensor
    latents: Tensor
    prediction: Tensor
    state: State
    noise: Tensor | None
    kept: bool = False
    output_weight: float = 1.0
    input_scale: float = 1.0
    base: Tensor | None = None
    graph: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Sampled:
    """What a chain produced.

    Attributes:
        latents: (B, C, h, w), the final latents; (B * (1 + n), C, h, w) with n LV samples.
        weights: as many numbers, the weight of a row within its sample.
        penalty: the regularization, a scalar.
        records: the steps from the first kept one.
        copies: the steps of the n LV samples.
    """

    latents: Tensor
    weights: Tensor
    penalty: Tensor
    records: list[Record]
    copies: list[Record]


class Chain:
    """The denoising chain of one batch.

    Args:
        calls: the networks.
        denoisers: the denoiser for batches of every shape.
        scheduler: the scheduler's steps as pure functions.
        conditioning: the encoded prompts of the B samples.
        truncation: the steps that keep their gradient; None for a chain without a gradient.
        regularization: weight of the squared difference to the base model's predictions; 0 computes none.
        stores: whether the kept network calls store their graphs for the backward pass.
        adapter_off: whether the trainable adapter is off: then there is no gradient.
    """

    def __init__(
        self,
        calls: NetworkCalls,
        denoisers: Denoisers,
        scheduler: Scheduler,
        conditioning: Conditioning,
        truncation: Truncation | None,
        *,
        regularization: float = 0.0,
        stores: bool = False,
        adapter_off: bool = False,
    ) -> None:
        self.scheduler, self.truncation, self.stores = scheduler, truncation, stores
        self.regularization = regularization if truncation is not None else 0.0
        self._calls, network = calls, calls.family.denoiser
        with torch.set_grad_enabled(truncation is not None):
            weights = calls.weights_of(network)
        base = None
        if self.regularization:
            with torch.no_grad(), adapters.disabled(network):
                base = calls.weights_of(network)
        self._batch = Batch(conditioning, weights, base, adapter_off)
        self._denoiser = denoisers.of(self._batch, captured=not stores)

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser with this batch's prompts and adapters, also after other batches."""
        if isinstance(self._denoiser, CapturedDenoiser) and self._denoiser.batch is not self._batch:
            self._denoiser.load(self._batch)
        return self._denoiser

    def run(self, noise: Noise) -> Sampled:
        """Denoise without a graph of the chain.

        Args:
            noise: the batch's randomness.
        """
        calls, scheduler, truncation = self._calls, self.scheduler, self.truncation
        noise = noise.to(calls.device, calls.dtype)
        latents, step_noise = scheduler.initial_scale * noise.initial, noise.steps
        state = scheduler.initial_state
        factors = {} if truncation is None else truncation.factors
        records: list[Record] = []
        for i in range(scheduler.steps):
            fresh = None if step_noise is None else step_noise[i]
            record = Record(i, scheduler.timesteps[i], latents, latents, state, fresh)
            if i in factors:
                record.kept = True
                record.output_weight, record.input_scale = factors[i]
                if not records:
                    record.input_scale = 0.0  # these latents depend on no kept step
            self._denoise(record)
            if record.kept or records:
                records.append(record)
            latents, state = self.after(record)
            if truncation is not None and i == truncation.stop_at:
                break
        weights = latents.new_ones(len(latents))
        if truncation is not None and truncation.leap_tolerance is not None:
            weights = self._leap_weights(records, latents, truncation.leap_tolerance)
        copies: list[Record] = []
        if truncation is not None and noise.lv is not None:
            copies = [self._lv_sample(latents, fresh) for fresh in noise.lv]
            latents = torch.cat([latents, *(self.after(copy)[0] for copy in copies)])
            # Each prompt has 1 + n rows, which share its weight.
            weights = weights.repeat(1 + len(copies)) / (1 + len(copies))
        penalty = self._penalty(records) if self.regularization else latents.new_zeros(())
        return Sampled(latents, weights, penalty, records, copies)

    def after(self, record: Record) -> tuple[Tensor, State]:
        """Return latents and state after a step: the scheduler's, or the clean-image estimate where sampling stops."""
        if self.truncation is not None and record.number == self.truncation.stop_at:
            return self.scheduler.clean(record.latents, record.prediction, record.number), ()
        return self.scheduler.step(record.latents, record.prediction, record.number, record.state, record.noise)

    def vjp(self, record: Record, graph: tuple[Tensor, Tensor] | None, at_prediction: Tensor) -> Tensor | None:
        """Add the VJP of a record's network call at the adapters to the denoiser's sum.

        Args:
            record: the step.
            graph: the call's graph, or None to run it again.
            at_prediction: (B, C, h, w), gradient at the prediction.

        Returns:
            (B, C, h, w), its part at the latents; None where the truncation stops the gradient.
        """
        if graph is not None:
            found = self.denoiser.pull(graph, at_prediction, retain_graph=True)
        else:
            found = self.denoiser.vjp(record.latents, record.timestep, at_prediction, at_input=record.input_scale != 0)
        return found if record.input_scale else None

    def _denoise(self, record: Record) -> None:
        if record.kept and self.stores:
            record.graph = self.denoiser.with_graph(record.latents, record.timestep, at_input=record.input_scale != 0)
            record.prediction = record.graph[1].detach()
        else:
            record.prediction = self.denoiser.predict(record.latents, record.timestep)

    def _leap_weights(self, records: Sequence[Record], latents: Tensor, tolerance: float) -> Tensor:
        """Return each sample's weight, (B,), from how far its leaps miss the chain (LeapAlign, arXiv:2604.15311)."""
        starts = [i for i, record in enumerate(records) if record.kept]
        ends = [*(records[i].latents for i in starts[1:]), latents]
        missed = torch.zeros_like(latents[:, 0, 0, 0])
        for start, stop, end in zip(starts, [*starts[1:], None], ends, strict=True):
            reached, state, prediction = records[start].latents, records[start].state, records[start].prediction
            for record in records[start:stop]:
                reached, state = self.scheduler.step(reached, prediction, record.number, state, record.noise)
            missed += (reached - end).abs().flatten(1).mean(1).clamp(min=tolerance)
        return 1 / missed

    def _penalty(self, records: Sequence[Record]) -> Tensor:
        """Return weight * mean over kept steps of sum_b mean((prediction_b - base_b)^2), a scalar.

        Mean over (C, h, w), sum over B: chunks of a batch add up to the batch's.
        """
        squares = []
        denoiser = self.denoiser
        with denoiser.base():
            for record in (record for record in records if record.kept):
                record.base = denoiser.predict(record.latents, record.timestep)
                squares.append((record.prediction - record.base).square().flatten(1).mean(1).sum())
        return self.regularization * torch.stack(squares).mean()

    def _lv_sample(self, latents: Tensor, fresh: Tensor) -> Record:
        """Return the step of a low-variance sample: renoise, and denoise once more (DRaFT-LV, Clark et al. 2024).

        It keeps the gradient of that step alone, as with last_k of 1.

        Args:
            latents: (B, C, h, w), the final latents.
            fresh: (B, C, h, w), standard normal.
        """
        last = self.scheduler.steps - 1
        renoised = self.scheduler.renoise(latents, last, fresh)
        timestep, state = self.scheduler.timesteps[last], self.scheduler.initial_state
        record = Record(last, timestep, renoised, renoised, state, None, kept=True, input_scale=0.0)
        self._denoise(record)
        return record
