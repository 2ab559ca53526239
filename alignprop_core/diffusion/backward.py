"""The gradient of a denoising chain, step by step, as one autograd function of the adapters.

The backward pass goes through the recorded steps from the last. At every step the scheduler's map takes the gradient
from the step's result to its latents, prediction and state; at a kept step the network's vector-Jacobian product (VJP)
takes the prediction's gradient to the adapters and to the latents. Its peak memory is that of one step, however many
are kept. A dropped step's prediction and the noise of a step are constants.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alignprop_core.diffusion.chain import Chain, Record
from alignprop_core.diffusion.noise import Noise
from alignprop_core.diffusion.schedulers import State


class DifferentiableChain(torch.autograd.Function):
    """(chain, noise, *parameters) -> (final latents, rows' weights, regularization), differentiable once."""

    @staticmethod
    def forward(ctx: Any, chain: Chain, noise: Noise, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sample; the steps are recorded in `ctx`."""
        sampled = chain.run(noise)
        ctx.chain, ctx.records, ctx.copies = chain, sampled.records, sampled.copies
        # Autograd frees what it saves after the backward pass, stored graphs included, and raises there if a parameter
        # has been changed in place since.
        graphs = {
            id(record): record.graph for record in (*sampled.records, *sampled.copies) if record.graph is not None
        }
        ctx.stored = list(graphs)
        ctx.save_for_backward(*parameters, *(tensor for graph in graphs.values() for tensor in graph))
        for record in (*sampled.records, *sampled.copies):
            record.graph = None
        ctx.mark_non_differentiable(sampled.weights)
        return sampled.latents, sampled.weights, sampled.penalty

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, at_latents: Tensor, _at_weights: Tensor, at_penalty: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of each parameter, from those at the final latents and at the regularization."""
        chain: Chain = ctx.chain
        denoiser = chain.denoiser
        saved = ctx.saved_tensors[len(denoiser.parameters) :]
        graphs = dict(zip(ctx.stored, zip(saved[::2], saved[1::2], strict=True), strict=True))
        denoiser.gradient.zero_()

        gradient, *at_copies = at_latents.chunk(1 + len(ctx.copies))
        for record, at_copy in zip(ctx.copies, at_copies, strict=True):
            _, at_prediction, _ = scheduler_vjp(chain, record, at_copy, ())
            chain.vjp(record, graphs.get(id(record)), at_prediction)
        # Derivative of weight * mean over kept steps, and over each sample's elements, of the squared difference.
        kept = sum(record.kept for record in ctx.records)
        slope = at_penalty * (2 * chain.regularization / kept / gradient[0].numel())
        state: State = ()
        for record in reversed(ctx.records):
            slope_at_latents = None if record.kept or state else chain.scheduler.slope(record.number)
            if slope_at_latents is not None:
                gradient = slope_at_latents * gradient
                continue
            gradient, at_prediction, state = scheduler_vjp(chain, record, gradient, state)
            if not record.kept:
                continue
            at_prediction = record.output_weight * at_prediction
            if record.base is not None:
                pull = slope * (record.prediction - record.base)
                at_prediction = at_prediction + pull
                if record.input_scale:
                    # Both networks see these latents: without the base model's part, the latents would be pulled to
                    # where the adapted prediction equals a constant, instead of to where the two predictions agree.
                    with denoiser.base():
                        at_base = denoiser.base_vjp(record.latents, record.timestep, pull)
                    gradient = gradient - record.input_scale * at_base
            at_input = chain.vjp(record, graphs.get(id(record)), at_prediction)
            if at_input is not None:
                gradient = gradient + record.input_scale * at_input
        # Once per batch, from the layers' tensors to A and B. The graph stays, for another backward pass.
        weights, parts = denoiser.parts()
        found = torch.autograd.grad(weights, denoiser.parameters, parts, retain_graph=True, allow_unused=True)
        return None, None, *found


def scheduler_vjp(chain: Chain, record: Record, at_latents: Tensor, at_state: State) -> tuple[Tensor, Tensor, State]:
    """Return the gradient at a step's latents, prediction and state, from the gradient at its result."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (record.latents, record.prediction, *record.state)]
        latents, prediction, *state = leaves
        results = chain.after(replace(record, latents=latents, prediction=prediction, state=tuple(state)))
    # Nothing depends on the state after the last step, hence zip's end at the shorter one.
    pairs = [(results[0], at_latents), *zip(results[1], at_state, strict=False)]
    outputs, gradients = zip(*[pair for pair in pairs if pair[0].requires_grad], strict=True)
    found = torch.autograd.grad(outputs, leaves, gradients, allow_unused=True, materialize_grads=True)
    return found[0], found[1], tuple(found[2:])
