"""Captured calls: on a CPU, that their fixed tensors are filled for each batch; on a GPU, the graphs themselves."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from alignprop_core.config.model import BackpropConfig, SamplingConfig
from alignprop_core.diffusion.cuda_graphs import Call, Pool
from alignprop_core.diffusion.decoder import CapturedDecoder
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.errors import RunError
from alignprop_core.lora import adapters as lora
from alignprop_core.testing.pipelines import tiny_pipeline

PROMPTS = ["fox", "two owls"]
STRATEGIES: list[dict[str, Any]] = [
    {"strategy": "full"},
    {"strategy": "last_k", "k": 2},
    {"strategy": "last_k", "lv_samples": 2},
    {"strategy": "drtune", "k": 2},
    {"strategy": "refl"},
    {"strategy": "bernoulli"},
    {"strategy": "sparse", "k": 2},
    {"strategy": "bridge", "k": 3},
    {"strategy": "leap"},
]


class Replays:
    """Calls a function as a CUDA graph does: on the tensors of its capture, with what the last replay has left."""

    def __init__(self, pool: FixedTensors, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> None:
        self.pool, self.function, self.inputs = pool, function, inputs

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        for static, given in zip(self.inputs, inputs, strict=True):
            static.copy_(given)
        self.pool.replays += 1
        decoder = getattr(self.function, "__self__", None)
        if isinstance(decoder, CapturedDecoder) and self.function == decoder.backward.function:
            assert self.pool.left is not None, "the activations have been overwritten"
            decoder._graph = self.pool.left
            return [output.detach().clone() for output in self.function(*self.inputs)]
        outputs = [output.detach().clone() for output in self.function(*self.inputs)]
        self.pool.left = decoder._graph if isinstance(decoder, CapturedDecoder) else None
        return outputs


class FixedTensors(Pool):
    """A pool for a CPU."""

    def __init__(self) -> None:
        super().__init__(True, torch.device("cpu"))
        self.captures = 0
        self.left: tuple[Tensor, Tensor] | None = None

    def capture(self, calls: Sequence[Call]) -> None:
        """Make replays of the calls; like a capture, call them twice before."""
        with torch.inference_mode(False):
            static = [[tensor.detach().clone() for tensor in call.shapes] for call in calls]
        for _ in range(2 if calls else 0):
            for call, tensors in zip(calls, static, strict=True):
                call.function(*tensors)
        for call, tensors in zip(calls, static, strict=True):
            graph: Any = Replays(self, call.function, tensors)
            call.graph = graph
        self.captures += len(calls)


def tuned(pipe: Any, seed: int = 0, target_modules: list[str] | None = None) -> list[torch.nn.Parameter]:
    """Attach an adapter whose B is not zero."""
    parameters = lora.attach(
        pipe.unet if hasattr(pipe, "unet") else pipe.transformer,
        rank=2,
        alpha=3.0,
        seed=seed,
        target_modules=target_modules,
        dtype=torch.float64 if pipe.dtype == torch.float64 else torch.float32,
    )
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in parameters[1::2]:
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return parameters


def samplers(pipe: Any, backprop: dict[str, Any], **options: Any) -> tuple[Sampler, Sampler, FixedTensors]:
    """Return a sampler that runs eagerly, one with fixed tensors, and the pool of the second."""
    sampling = SamplingConfig(steps=4, guidance_scale=3.0, eta=0.5)
    eager, fixed = (Sampler(pipe, sampling, BackpropConfig.model_validate(backprop), **options) for _ in range(2))
    pool = FixedTensors()
    fixed.engine.use(pool)
    return eager, fixed, pool


def gradient(sampler: Sampler, parameters: Sequence[torch.nn.Parameter], prompts: Sequence[str], step: int) -> Tensor:
    """Return the flat gradient of a weighted sum of pixels and of the regularization."""
    out = sampler.sample(prompts, sampler.noise(prompts, seed=7, step=step))
    latents = out.latents.detach().requires_grad_()
    images = sampler.decode(latents)
    weights = torch.linspace(-1, 1, images.numel()).view_as(images).to(images)
    (ascent,) = torch.autograd.grad((weights * images).sum(), latents)
    sampler.backward(out, ascent)
    found = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return found


@pytest.mark.parametrize("regularization", [0.0, 0.3])
@pytest.mark.parametrize("backprop", [STRATEGIES[i] for i in (0, 2, 3)], ids=lambda backprop: backprop["strategy"])
def test_fixed_tensors_give_the_same_gradient(
    tiny_sd: Callable[..., Any], backprop: dict[str, Any], regularization: float
) -> None:
    pipe = tiny_sd().to(torch.float64)
    parameters = tuned(pipe)
    eager, fixed, pool = samplers(
        pipe, backprop | {"checkpoint_steps": True, "checkpoint_blocks": False}, regularization=regularization
    )
    for step, prompts in enumerate((PROMPTS, ["owl", "a red fox"], ["fox"], PROMPTS)):
        expected = gradient(eager, parameters, prompts, step)
        found = gradient(fixed, parameters, prompts, step)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))
        with torch.no_grad():
            parameters[1].add_(0.01)
    assert pool.replays > 0


def test_each_batch_has_its_own_prompts_adapters_and_activations(tiny_sd: Callable[..., Any], tmp_path: Path) -> None:
    """Another batch, an evaluation and a change of strength between sampling and the backward pass change nothing."""
    pipe = tiny_sd().to(torch.float64)
    lora.attach(pipe.unet, rank=2, dtype=torch.float64)
    lora.save(pipe.unet, tmp_path, name="frozen")
    pipe = tiny_sd().to(torch.float64)
    lora.attach_frozen(pipe, tmp_path / "frozen.safetensors", 0.5, dtype=torch.float64)
    parameters = tuned(pipe)
    eager, fixed, pool = samplers(pipe, {"strategy": "full", "checkpoint_steps": True, "checkpoint_blocks": False})
    expected = gradient(eager, parameters, PROMPTS, 0)
    with torch.no_grad(), eager.without_lora():
        base = eager.sample(PROMPTS, eager.noise(PROMPTS)).latents

    out = fixed.sample(PROMPTS, fixed.noise(PROMPTS, seed=7))
    latents = out.latents.detach().requires_grad_()
    images = fixed.decode(latents)
    gradient(fixed, parameters, ["owl", "bee"], 3)
    with torch.no_grad(), fixed.without_lora():
        torch.testing.assert_close(fixed.sample(PROMPTS, fixed.noise(PROMPTS)).latents, base)
    lora.set_strength(pipe.unet, 0.1)
    assert (gradient(fixed, parameters, PROMPTS, 0) - expected).abs().max() > 0
    weights = torch.linspace(-1, 1, images.numel()).view_as(images).to(images)
    for _ in range(2):  # as with several terms that are balanced at the latents
        (ascent,) = torch.autograd.grad((weights * images).sum(), latents, retain_graph=True)
    fixed.backward(out, ascent)
    found = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))
    assert pool.captures == 4, "denoiser: VJP and prediction; decoder: forward and backward"


def test_gradients_of_batches_add_up_and_are_not_shared(tiny_sd: Callable[..., Any]) -> None:
    pipe = tiny_sd().to(torch.float64)
    parameters = tuned(pipe)
    eager, fixed, _ = samplers(pipe, {"strategy": "full", "checkpoint_steps": True, "checkpoint_blocks": False})
    expected = gradient(eager, parameters, PROMPTS, 0) + gradient(eager, parameters, PROMPTS, 1)
    for step in range(2):
        out = fixed.sample(PROMPTS, fixed.noise(PROMPTS, seed=7, step=step))
        latents = out.latents.detach().requires_grad_()
        images = fixed.decode(latents)
        weights = torch.linspace(-1, 1, images.numel()).view_as(images).to(images)
        fixed.backward(out, torch.autograd.grad((weights * images).sum(), latents)[0])
    found = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))


def test_convolution_adapters_and_their_strength(tiny_sd: Callable[..., Any]) -> None:
    """peft runs these layers with the strength as a Python number, so another strength needs another capture."""
    pipe = tiny_sd().to(torch.float64)
    parameters = tuned(pipe, target_modules=["to_q", "conv1"])
    eager, fixed, pool = samplers(
        pipe, {"strategy": "full", "checkpoint_steps": True, "checkpoint_blocks": False}, regularization=0.3
    )
    for step, strength in enumerate((1.0, 0.3, 1.0)):
        lora.set_strength(pipe.unet, strength)
        expected = gradient(eager, parameters, PROMPTS, step)
        found = gradient(fixed, parameters, PROMPTS, step)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))
    assert pool.captures == 6, "twice the denoiser's VJP and prediction, once the decoder's forward and backward"


def test_a_network_with_hooks_runs_eagerly_with_one_warning(tiny_sd: Callable[..., Any]) -> None:
    pipe = tiny_sd().to(torch.float64)
    parameters = tuned(pipe)
    eager, fixed, pool = samplers(pipe, {"strategy": "full", "checkpoint_steps": True, "checkpoint_blocks": False})
    calls: list[object] = []
    handle = pipe.unet.mid_block.register_forward_hook(lambda *_: calls.append(None))
    expected = gradient(eager, parameters, PROMPTS, 0)
    before = len(calls)
    with pytest.warns(UserWarning, match=r"CUDA graphs are off: UNet2DConditionModel\.mid_block has a hook") as shown:
        found = gradient(fixed, parameters, PROMPTS, 0)
    assert len(shown) == 1
    assert len(calls) == 2 * before
    assert not pool.captures
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    handle.remove()


def test_stored_graphs_and_regularization_with_fixed_tensors(tiny_sd: Callable[..., Any]) -> None:
    """A stored graph would be broken by another batch's values, so it belongs to one batch."""
    pipe = tiny_sd().to(torch.float64)
    parameters = tuned(pipe)
    eager, fixed, _ = samplers(pipe, {"strategy": "full", "checkpoint_steps": False}, regularization=0.3)
    expected = gradient(eager, parameters, PROMPTS, 0)
    torch.testing.assert_close(gradient(fixed, parameters, PROMPTS, 0), expected, rtol=1e-9, atol=1e-12)


def test_an_evaluation_in_inference_mode_before_training(tiny_sd: Callable[..., Any]) -> None:
    pipe = tiny_sd().to(torch.float64)
    parameters = tuned(pipe)
    eager, fixed, _ = samplers(pipe, {"strategy": "full", "checkpoint_steps": True})
    with torch.inference_mode():
        for sampler in (eager, fixed):
            sampler.decode(sampler.sample(PROMPTS, sampler.noise(PROMPTS)).latents)
    expected = gradient(eager, parameters, PROMPTS, 0)
    torch.testing.assert_close(gradient(fixed, parameters, PROMPTS, 0), expected, rtol=1e-9, atol=1e-12)


def test_frozen_parameters_and_freeu_need_another_capture(tiny_sd: Callable[..., Any]) -> None:
    pipe = tiny_sd().to(torch.float64)
    parameters = tuned(pipe)
    eager, fixed, pool = samplers(pipe, {"strategy": "full", "checkpoint_steps": True})
    gradient(fixed, parameters, PROMPTS, 0)
    for parameter in parameters[::2]:
        parameter.requires_grad_(False)
    expected = gradient(eager, parameters, PROMPTS, 0)
    torch.testing.assert_close(gradient(fixed, parameters, PROMPTS, 0), expected, rtol=1e-9, atol=1e-12)
    before = pool.captures
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    gradient(fixed, parameters, PROMPTS, 0)
    assert pool.captures == before + 2
    pipe.disable_freeu()


@pytest.mark.parametrize("captures", [False, True])
def test_convolution_adapters_that_were_off_have_no_gradient(tiny_sd: Callable[..., Any], captures: bool) -> None:
    pipe = tiny_sd().to(torch.float64)
    tuned(pipe, target_modules=["conv1"])
    sampler = samplers(pipe, {"strategy": "full", "checkpoint_steps": True})[captures]
    with sampler.without_lora():
        out = sampler.sample(PROMPTS, sampler.noise(PROMPTS))
    with pytest.raises(RunError, match="adapter was off"):
        sampler.backward(out, torch.ones_like(out.latents))


# -- on a GPU ---------------------------------------------------------------------------------------------------------


def on_gpu(pipe: Any, dtype: torch.dtype, backprop: dict[str, Any], **options: Any) -> tuple[Sampler, Sampler, Any]:
    """Return a sampler that runs eagerly, one that captures, and the adapter's parameters."""
    pipe = pipe.to("cuda", dtype)
    parameters = tuned(pipe)
    sampling = SamplingConfig(steps=4, guidance_scale=3.0, eta=0.5 if hasattr(pipe, "unet") else 0.0)
    eager, captured = (
        Sampler(pipe, sampling, BackpropConfig.model_validate(backprop | {"cuda_graphs": graphs}), **options)
        for graphs in (False, True)
    )
    return eager, captured, parameters


@pytest.mark.gpu
@pytest.mark.parametrize(("regularization", "blocks"), [(0.0, False), (0.3, True)])
@pytest.mark.parametrize("backprop", STRATEGIES, ids=lambda backprop: backprop["strategy"])
def test_captured_gradients_equal_those_of_eager_calls(
    tiny_sd: Callable[..., Any], backprop: dict[str, Any], regularization: float, blocks: bool
) -> None:
    eager, captured, parameters = on_gpu(
        tiny_sd(), torch.float64, backprop | {"checkpoint_blocks": blocks}, regularization=regularization
    )
    for step, prompts in enumerate((PROMPTS, ["fox"], ["owl", "a red fox"])):
        expected = gradient(eager, parameters, prompts, step)
        found = gradient(captured, parameters, prompts, step)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))
        with torch.no_grad():
            expected_latents = eager.sample(prompts, eager.noise(prompts)).latents
            torch.testing.assert_close(captured.sample(prompts, captured.noise(prompts)).latents, expected_latents)
            parameters[1].add_(0.01)
    assert captured.engine.pool.enabled
    assert captured.engine.pool.replays > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_captured_gradients_in_half_precision_are_as_good_as_eager_ones(
    tiny_sd: Callable[..., Any], dtype: torch.dtype
) -> None:
    backprop = {"strategy": "full"}
    full, _, parameters = on_gpu(tiny_sd(), torch.float32, backprop)
    exact = gradient(full, parameters, PROMPTS, 0)
    eager, captured, parameters = on_gpu(tiny_sd(), dtype, backprop)
    cosines = [
        float(torch.nn.functional.cosine_similarity(exact, gradient(sampler, parameters, PROMPTS, 0), dim=0))
        for sampler in (eager, captured)
    ]
    assert captured.engine.pool.replays > 0
    assert cosines[1] > cosines[0] - 0.001
    assert cosines[1] > 0.99


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "recomputes", "rounding"),
    [
        ("stable_diffusion", False, 1e-12),
        ("stable_diffusion", True, 1e-12),
        ("stable_diffusion_3", False, 1e-12),
        # Their rotary positions are computed in float32 whatever the network's dtype; compiled code rounds otherwise.
        ("flux", True, 1e-6),
        ("flux2_klein", False, 1e-6),
        ("z_image", False, 1e-6),
    ],
)
def test_compiled_blocks_give_the_same_gradient_and_are_kept_on_disk(
    family: str, recomputes: bool, rounding: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as torch sets it
    backprop = {"strategy": "last_k", "k": 2, "checkpoint_blocks": recomputes}
    eager, captured, parameters = on_gpu(tiny_pipeline(family), torch.float64, backprop)
    captured.engine.compile()
    expected = gradient(eager, parameters, PROMPTS, 0)
    found = gradient(captured, parameters, PROMPTS, 0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=rounding * float(expected.abs().max()))
    assert captured.engine.pool.replays > 0
    assert any((tmp_path / ".cache" / "alignprop" / "compiled").rglob("*.py")), "generated code"


@pytest.mark.gpu
def test_a_batch_between_sampling_and_backward_on_a_gpu(tiny_sd: Callable[..., Any]) -> None:
    eager, captured, parameters = on_gpu(tiny_sd(), torch.float64, {"strategy": "full"})
    expected = gradient(eager, parameters, PROMPTS, 0)
    out = captured.sample(PROMPTS, captured.noise(PROMPTS, seed=7))
    latents = out.latents.detach().requires_grad_()
    images = captured.decode(latents)
    gradient(captured, parameters, ["owl", "bee"], 3)
    gradient(captured, parameters, ["bee"], 4)
    with torch.no_grad(), captured.without_lora():
        captured.sample(PROMPTS, captured.noise(PROMPTS))
    weights = torch.linspace(-1, 1, images.numel()).view_as(images).to(images)
    for _ in range(2):
        (ascent,) = torch.autograd.grad((weights * images).sum(), latents, retain_graph=True)
    captured.backward(out, ascent)
    found = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("reason", reasons := ["waits for the host", "memory", "memory inside a capture"])
def test_what_cannot_be_captured_runs_eagerly_with_one_warning(
    tiny_sd: Callable[..., Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails, the gradient is right, later captures work, and the failed one's memory is free."""
    pipe = tiny_sd()
    eager, captured, parameters = on_gpu(pipe, torch.float64, {"strategy": "full", "checkpoint_blocks": False})
    expected = gradient(eager, parameters, PROMPTS, 0)
    predict = captured.family.predict

    def failing(latents: Tensor, timestep: Tensor, conditioning: Any) -> Tensor:
        if reason == "waits for the host":
            float(latents.sum())
        trial = torch.cuda.current_stream() != torch.cuda.default_stream()
        if trial and (reason == "memory" or (reason != reasons[0] and torch.cuda.is_current_stream_capturing())):
            torch.empty(10**12, device="cuda")
        return predict(latents, timestep, conditioning)

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    monkeypatch.setattr(captured.family, "predict", failing)
    message = "not enough memory" if "memory" in reason else "synchronizing"
    with pytest.warns(UserWarning, match=f"CUDA graphs are off: .*{message}") as shown:
        found = gradient(captured, parameters, PROMPTS, 0)
    assert len([w for w in shown if "CUDA graphs" in str(w.message)]) == 1, [str(w.message) for w in shown]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    monkeypatch.undo()
    again = Sampler(pipe, captured.sampling, BackpropConfig(strategy="full"))
    torch.testing.assert_close(gradient(again, parameters, PROMPTS, 0), expected, rtol=1e-9, atol=1e-12)
    assert again.engine.pool.replays > 0
    del captured, again, found
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() < before + 2**20
