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
from alignprop_core.diffusion.cpu import replaced
from alignprop_core.diffusion.half import scaled
from alignprop_core.diffusion.noise import Noise
from alignprop_core.diffusion.schedulers import State
from alignprop_core.errors import RunError
from alignprop_core.lora import adapters


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
        saved = ctx.saved_tensors[len(chain.parameters) :]
        graphs = dict(zip(ctx.stored, zip(saved[::2], saved[1::2], strict=True), strict=True))
        total: list[Tensor | None] = [None] * (len(chain.leaves) + len(chain.parameters))

        gradient, *at_copies = at_latents.chunk(1 + len(ctx.copies))
        for record, at_copy in zip(ctx.copies, at_copies, strict=True):
            _, at_prediction, _ = scheduler_vjp(chain, record, at_copy, ())
            network_vjp(chain, graphs.get(id(record)) or chain.call(record, graph=True), at_prediction, total)
        # Derivative of weight * mean over kept steps, and over each sample's elements, of the squared difference.
        kept = sum(record.kept for record in ctx.records)
        slope = at_penalty * (2 * chain.regularization / kept / gradient[0].numel())
        state: State = ()
        for record in reversed(ctx.records):
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
                    gradient = gradient - record.input_scale * base_vjp(chain, record, pull)
            graph = graphs.get(id(record)) or chain.call(record, graph=True)
            at_input = network_vjp(chain, graph, at_prediction, total)
            if at_input is not None:
                gradient = gradient + record.input_scale * at_input
        # Once per batch, from the layers' tensors to A and B. The graph stays, for another backward pass.
        reached = [pair for pair in zip([*chain.sums, *chain.parameters], total, strict=True) if pair[1] is not None]
        weights, parts = zip(*reached, strict=True)
        found = torch.autograd.grad(weights, chain.parameters, parts, retain_graph=True, allow_unused=True)
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


def network_vjp(
    chain: Chain, graph: tuple[Tensor, Tensor], at_prediction: Tensor, total: list[Tensor | None]
) -> Tensor | None:
    """Add the VJP of a network call at the weights to `total`; return its part at the network's input.

    Args:
        chain: the chain.
        graph: the network's input and output with their graph.
        at_prediction: (B, C, h, w), gradient at the output.
        total: the gradient so far at the effective weights, then at the parameters; None where there is none.

    Returns:
        (B, C, h, w), or None where the truncation stops the gradient.

    Raises:
        RunError: the network call depends on no trainable parameter.
    """
    inputs, output = graph
    if not output.requires_grad:
        raise RunError(
            "The sample carries no gradient: the trainable adapter was off while it was generated. Sample outside of "
            "`without_lora()`."
        )
    factor: Tensor | float = 1.0
    if chain.scales_gradients:
        at_prediction, factor = scaled(at_prediction)
    wanted = [*chain.leaves, *chain.parameters, *([inputs] if inputs.requires_grad else [])]
    with replaced(chain.forwards):
        found = torch.autograd.grad(output, wanted, at_prediction, retain_graph=chain.stores, allow_unused=True)
    for i, (one, other) in enumerate(zip(total, found, strict=False)):
        if other is not None:
            # Half-precision parts are added up in full precision.
            part = factor * other.to(at_prediction.dtype)
            total[i] = part if one is None else one + part
    return factor * found[-1] if inputs.requires_grad else None


def base_vjp(chain: Chain, record: Record, at_prediction: Tensor) -> Tensor:
    """Return the VJP of the base model at a step's latents, (B, C, h, w); nothing in it is trainable."""
    # The adapters are off in the backward pass as well: a network with checkpointing inside runs again there.
    with adapters.disabled(chain.denoiser), torch.enable_grad():
        inputs = record.latents.detach().requires_grad_()
        output = chain.predict_base(inputs, chain.scheduler.timesteps[record.number])
        gradient, factor = scaled(at_prediction) if chain.scales_gradients else (at_prediction, 1.0)
        with replaced(chain.base_forwards):
            return factor * torch.autograd.grad(output, inputs, gradient)[0]
