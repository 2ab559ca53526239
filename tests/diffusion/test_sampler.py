"""The differentiable sampler: images equal diffusers', gradients equal plain autograd's, noise depends on its key."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from alignprop_core.config.model import BackpropConfig, SamplingConfig, Strategy
from alignprop_core.diffusion.memory import graph_bytes, part_of
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.diffusion.truncation import Truncation, draw_truncation
from alignprop_core.errors import ConfigError, ModelError, RunError
from tests.support.plain_autograd import plain_autograd

PROMPTS = ["a fox", "three owls on a blue hill", "b"]
STEPS = 5
SETTINGS: dict[str, dict[str, Any]] = {
    "last_k": {"strategy": "last_k", "k": 2},
    "uniform": {"strategy": "uniform"},
    "gaussian": {"strategy": "gaussian", "mean": 3.0, "std": 1.0},
    "full": {"strategy": "full"},
    "drtune": {"strategy": "drtune", "k": 2},
    "refl": {"strategy": "refl", "refl_steps": 3},
    "bernoulli": {"strategy": "bernoulli", "keep_probability": 0.5},
    "lv": {"strategy": "last_k", "lv_samples": 2},
    "sparse": {"strategy": "sparse", "k": 2},
    "bridge": {"strategy": "bridge", "k": 3, "input_scale": 0.4},
    "leap": {"strategy": "leap"},
}


@pytest.fixture
def pipe(tiny_sd: Callable[..., Any]) -> Any:
    return tiny_sd()


def trainable(pipe: Any) -> list[Tensor]:
    """Make the attention projections trainable: the layers that LoRA adapts, without LoRA."""
    pipe.unet.requires_grad_(False)
    pipe.vae.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    parameters = [p for name, p in pipe.unet.named_parameters() if name.endswith(("to_q.weight", "to_v.weight"))]
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def gradients(parameters: list[Tensor]) -> Tensor:
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return flat


def objective(images: Tensor) -> Tensor:
    """Return a smooth function of the pixels in which every pixel and sample has its own weight."""
    weights = torch.linspace(-1, 1, images.numel(), dtype=images.dtype).view_as(images).cos()
    return (weights * images + 0.3 * images**2).sum()


# -- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("guidance", "eta"), [(5.0, 0.0), (1.0, 0.0), (4.0, 0.7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_image_equals_diffusers_own_pipeline(
    tiny_sd: Callable[..., Any], prediction_type: str, guidance: float, eta: float, dtype: torch.dtype
) -> None:
    pipe = tiny_sd(prediction_type=prediction_type).to(dtype)
    sampling = SamplingConfig(steps=STEPS, guidance_scale=guidance, eta=eta, negative_prompt="blur")
    theirs = pipe(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        eta=eta,
        negative_prompt=["blur"] * len(PROMPTS),
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images
    with torch.no_grad():
        ours = Sampler(pipe, sampling)(PROMPTS, generator=torch.Generator().manual_seed(3))
    assert ours.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("clip", [True, False])
def test_image_equals_diffusers_for_every_scheduler_config(
    tiny_sd: Callable[..., Any], spacing: str, clip: bool
) -> None:
    pipe = tiny_sd(prediction_type="v_prediction").to(torch.float64)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing=spacing, clip_sample=clip, rescale_betas_zero_snr=True
    )
    theirs = pipe(
        "fox", num_inference_steps=4, guidance_scale=3.0, generator=torch.Generator().manual_seed(1), output_type="pt"
    ).images
    sampler = Sampler(pipe, SamplingConfig(steps=4, guidance_scale=3.0))
    with torch.no_grad():
        ours = sampler(["fox"], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_other_image_sizes(pipe: Any) -> None:
    sampler = Sampler(pipe, SamplingConfig(steps=2, width=48, height=32))
    with torch.no_grad():
        assert sampler(["fox"], generator=torch.Generator().manual_seed(0)).shape == (1, 3, 32, 48)


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    ("prediction_type", "checkpointing"),
    [
        ("epsilon", False),
        ("v_prediction", True),
        pytest.param("epsilon", True, marks=pytest.mark.slow),
        pytest.param("v_prediction", False, marks=pytest.mark.slow),
    ],
)
def test_gradient_equals_plain_autograd(
    tiny_sd: Callable[..., Any], name: str, prediction_type: str, checkpointing: bool
) -> None:
    pipe = tiny_sd(prediction_type=prediction_type).to(torch.float64)
    parameters = trainable(pipe)
    eta = 0.6 if name in ("uniform", "full", "lv") else 0.0
    sampling = SamplingConfig(steps=STEPS, guidance_scale=3.0, eta=eta, negative_prompt="x")
    backprop = BackpropConfig(
        checkpoint_steps=checkpointing,
        checkpoint_blocks=checkpointing,
        checkpoint_decoder=checkpointing,
        **SETTINGS[name],
    )
    sampler = Sampler(pipe, sampling, backprop)
    for step in range(2):
        noise = sampler.noise(PROMPTS, seed=7, step=step)
        truncation = draw_truncation(sampler.backprop, sampler.step_sizes, seed=7, step=step)
        expected_images = plain_autograd(pipe, PROMPTS, sampling, noise, truncation)
        objective(expected_images).backward()
        expected = gradients(parameters)

        out = sampler.sample(PROMPTS, noise)  # draws the same truncation from the noise's seed and step
        leaf = out.latents.detach().requires_grad_()
        images = sampler.decode(leaf)
        torch.testing.assert_close(images, expected_images, atol=1e-6, rtol=0)
        objective(images).backward()
        assert leaf.grad is not None
        sampler.backward(out, leaf.grad)
        actual = gradients(parameters)
        assert expected.norm() > 0
        # Alphas are float32 in diffusers' tables; sums taken in another order differ in the last bits only.
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9 * float(expected.norm()))


def test_chunks_change_nothing(pipe: Any) -> None:
    pipe = pipe.to(torch.float64)
    parameters = trainable(pipe)
    sampler = Sampler(pipe, SamplingConfig(steps=4, guidance_scale=3.0, eta=0.5), BackpropConfig(strategy="uniform"))
    noise = sampler.noise(PROMPTS, seed=1, step=5)

    def run(parts: list[slice], decode_chunk: int) -> tuple[Tensor, Tensor]:
        images, start = [], 0
        for part in parts:
            out = sampler.sample(PROMPTS[part], noise[part])
            grads = []
            for i in range(0, len(out.latents), decode_chunk):
                leaf = out.latents[i : i + decode_chunk].detach().requires_grad_()
                pixels = sampler.decode(leaf)
                weights = torch.arange(start, start + len(pixels), dtype=pixels.dtype).view(-1, 1, 1, 1) + 1
                start += len(pixels)
                (weights * pixels**2).sum().backward()
                grads.append(leaf.grad)
                images.append(pixels.detach())
            sampler.backward(out, torch.cat(grads))
        return torch.cat(images), gradients(parameters)

    whole_images, whole = run([slice(0, 3)], 3)
    for parts, chunk in (([slice(0, 3)], 1), ([slice(0, 1), slice(1, 3)], 2)):
        images, grads = run(parts, chunk)
        torch.testing.assert_close(images, whole_images, atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(grads, whole, rtol=1e-9, atol=1e-12 * float(whole.norm()))


def test_steps_before_the_first_kept_one_have_no_graph(pipe: Any) -> None:
    trainable(pipe)
    grad_calls: list[bool] = []
    pipe.unet.register_forward_hook(lambda *_: grad_calls.append(torch.is_grad_enabled()))
    backprop = BackpropConfig(strategy="last_k", k=2, checkpoint_steps=False, checkpoint_blocks=False)
    sampler = Sampler(pipe, SamplingConfig(steps=6), backprop)
    sampler.sample(PROMPTS, sampler.noise(PROMPTS, seed=0, step=0))
    assert grad_calls == [False] * 4 + [True] * 2


def test_saturated_pixels_still_get_a_gradient(pipe: Any) -> None:
    trainable(pipe)
    pipe.vae.decoder.conv_out.weight.data *= 30
    sampler = Sampler(pipe, SamplingConfig(steps=2))
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    images = sampler.decode(latents)
    saturated = (images == 0) | (images == 1)
    assert saturated.float().mean() > 0.1
    (images * saturated).sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0


def test_backward_without_a_trainable_parameter_is_an_error(pipe: Any) -> None:
    for module in (pipe.unet, pipe.vae):
        module.requires_grad_(False)
    sampler = Sampler(pipe, SamplingConfig(steps=2))
    out = sampler.sample(["fox"], sampler.noise(["fox"], seed=0, step=0))
    with pytest.raises(RunError, match="no parameter of the denoiser is trainable"):
        sampler.backward(out, torch.ones_like(out.latents))


def test_auto_checkpointing_depends_on_the_available_memory(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainable(pipe)
    calls: list[int] = []
    # Before the call: a recomputation ends as soon as it has what the backward pass needs.
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))

    def recomputed(available: float) -> tuple[int, bool]:
        monkeypatch.setattr("alignprop_core.diffusion.memory.available_bytes", lambda device: available)
        sampler = Sampler(pipe, SamplingConfig(steps=3, guidance_scale=1.0), BackpropConfig(strategy="full"))
        out = sampler.sample(["fox"], sampler.noise(["fox"], seed=0, step=0))
        calls.clear()
        sampler.backward(out, torch.ones_like(out.latents))
        return len(calls), pipe.unet.is_gradient_checkpointing

    latents, timestep = torch.zeros(1, 4, 4, 4), torch.tensor(1)
    text = Sampler(pipe, SamplingConfig(guidance_scale=1.0)).conditioning(["fox"]).positive["encoder_hidden_states"]
    one = graph_bytes(lambda: pipe.unet(latents, timestep, text, return_dict=False)[0], [pipe.unet])
    assert recomputed(available=2**40) == (0, False), "memory is plentiful: nothing is recomputed"
    assert recomputed(available=3 * one) == (3, False), "one step's activations fit: every kept step is called again"
    assert recomputed(available=1) == (3, True), "memory is short: so are the blocks inside a step"
    pipe.unet.disable_gradient_checkpointing()


# -- what is kept -----------------------------------------------------------------------------------------------------


def truncations() -> Iterator[tuple[str, int, Truncation]]:
    extreme = {
        "last_k": [{}, {"k": 1}, {"k": 999}],
        "uniform": [{}],
        "gaussian": [{}, {"mean": -50.0, "std": 0.0}, {"mean": 500.0, "std": 3.0}],
        "full": [{}],
        "drtune": [{}, {"k": 3}, {"k": 999}],
        "refl": [{}, {"refl_steps": 999}],
        "bernoulli": [{}, {"keep_probability": 1e-9}, {"keep_probability": 1.0}],
        "sparse": [{}, {"k": 1}, {"k": 999}, {"late_bias": 0.0}],
        "bridge": [{}, {"k": 1}, {"k": 2}, {"k": 999}],
        "leap": [{}],
    }
    assert set(extreme) == set(get_args(Strategy))
    for strategy, options in extreme.items():
        for option in options:
            config = BackpropConfig(strategy=strategy, **option)  # type: ignore[arg-type]
            for steps in (1, 2, 12, 50):
                for seed in range(40):
                    yield strategy, steps, draw_truncation(config, [1.0] * steps, seed=seed, step=0)


def test_at_least_one_step_keeps_its_gradient_whatever_the_settings() -> None:
    for strategy, steps, plan in truncations():
        assert plan.kept, strategy
        assert list(plan.kept) == sorted(set(plan.kept)), strategy
        assert plan.kept[0] >= 0, strategy
        assert plan.kept[-1] < steps, strategy


def test_uniform_draws_every_length_and_gaussian_its_mean() -> None:
    lengths = [
        len(draw_truncation(BackpropConfig(strategy="uniform"), [1.0] * 12, seed=s, step=0).kept) for s in range(1200)
    ]
    assert set(lengths) == set(range(1, 13))
    assert abs(sum(lengths) / len(lengths) - 6.5) < 0.3
    config = BackpropConfig(strategy="gaussian", mean=6.0, std=1.5)
    drawn = [len(draw_truncation(config, [1.0] * 12, seed=s, step=0).kept) for s in range(1200)]
    assert abs(sum(drawn) / len(drawn) - 6.0) < 0.2


def test_drtune_can_choose_every_step_and_spaces_them_evenly() -> None:
    seen = set()
    for seed in range(300):
        plan = draw_truncation(BackpropConfig(strategy="drtune", k=5), [1.0] * 12, seed=seed, step=0)
        assert len({b - a for a, b in zip(plan.kept, plan.kept[1:], strict=False)}) == 1
        assert plan.input_scales == (0.0,) * 5
        seen |= set(plan.kept)
    assert seen == set(range(12))


def test_the_truncation_is_drawn_once_per_batch(pipe: Any) -> None:
    sampler = Sampler(pipe, SamplingConfig(steps=12), BackpropConfig(strategy="bernoulli"))
    noise = sampler.noise(PROMPTS, seed=0, step=3)
    assert (noise[0:1].seed, noise[0:1].step) == (0, 3), "the truncation depends on nothing else"
    assert draw_truncation(sampler.backprop, sampler.step_sizes, seed=0, step=3) == draw_truncation(
        sampler.backprop, sampler.step_sizes, seed=0, step=3
    )
    assert len({draw_truncation(sampler.backprop, sampler.step_sizes, seed=0, step=s).kept for s in range(20)}) > 10


# -- randomness -------------------------------------------------------------------------------------------------------


def test_noise_depends_on_seed_step_and_global_index_only(pipe: Any) -> None:
    sampler = Sampler(pipe, SamplingConfig(steps=3, eta=1.0), BackpropConfig(strategy="last_k", lv_samples=2))
    torch.manual_seed(1)
    whole = sampler.noise(PROMPTS * 2, seed=5, step=2)
    torch.manual_seed(2)
    part = sampler.noise(PROMPTS[:2], seed=5, step=2, indices=[4, 1])
    for mine, theirs in ((part.initial, whole.initial[[4, 1]]),):
        assert torch.equal(mine, theirs)
    assert part.steps is not None
    assert part.lv is not None
    assert whole.steps is not None
    assert whole.lv is not None
    assert torch.equal(part.steps, whole.steps[:, [4, 1]])
    assert torch.equal(part.lv, whole.lv[:, [4, 1]])
    for other in ({"seed": 6, "step": 2}, {"seed": 5, "step": 3}):
        assert not torch.equal(sampler.noise(PROMPTS * 2, **other).initial, whole.initial)
    flat = whole.initial.flatten(1)
    assert (torch.corrcoef(flat) - torch.eye(6)).abs().max() < 0.5


def test_a_prompts_encoding_does_not_depend_on_its_batch(pipe: Any) -> None:
    a, b = (Sampler(pipe, SamplingConfig(steps=2)) for _ in range(2))
    together = a.conditioning(PROMPTS).positive["encoder_hidden_states"]
    for i, prompt in reversed(list(enumerate(PROMPTS))):
        assert torch.equal(b.conditioning([prompt]).positive["encoder_hidden_states"][0], together[i])


def test_a_prompt_longer_than_the_text_encoder_reads_is_cut_as_in_diffusers_with_one_warning(pipe: Any) -> None:
    sampler = Sampler(pipe, SamplingConfig(steps=2, guidance_scale=1.0))
    long = "a fox in the snow " * 100
    with pytest.warns(UserWarning, match=r"\d+ tokens, and the base model reads 77.*shown once") as shown:
        ours = sampler.conditioning([long, long + "at night"]).positive["encoder_hidden_states"]
    assert len(shown) == 1
    assert torch.equal(ours[0], pipe.encode_prompt([long], "cpu", 1, False)[0][0])
    assert torch.equal(ours[0], ours[1])


def test_lv_rows_name_the_prompt_they_belong_to(pipe: Any) -> None:
    trainable(pipe)
    sampler = Sampler(pipe, SamplingConfig(steps=3), BackpropConfig(strategy="last_k", lv_samples=2))
    noise = sampler.noise(PROMPTS, seed=0, step=0)
    out = sampler.sample(PROMPTS, noise)
    assert out.sample_index == (0, 1, 2) * 3
    assert torch.equal(out.sample_weights, torch.full((9,), 1 / 3))
    assert out.latents.shape[0] == 9
    with torch.no_grad():
        assert sampler.sample(PROMPTS, noise).latents.shape[0] == 3


# -- bad input --------------------------------------------------------------------------------------------------------


def test_unknown_pipeline_class_is_an_error_that_names_it(pipe: Any) -> None:
    class OtherPipeline:
        unet = pipe.unet

    with pytest.raises(ModelError, match="cannot run a OtherPipeline"):
        Sampler(OtherPipeline(), SamplingConfig())


def test_more_steps_than_the_model_has_timesteps(pipe: Any) -> None:
    with pytest.raises(ModelError, match="1001"):
        Sampler(pipe, SamplingConfig(steps=1001))


def test_true_cfg_scale_is_refused_with_the_right_key(pipe: Any) -> None:
    with pytest.raises(ConfigError, match=r"sampling\.guidance_scale"):
        Sampler(pipe, SamplingConfig(true_cfg_scale=2.0))


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheduler", [{"eta": 0.5}, {"scheduler": "euler_a"}, {"scheduler": "dpmpp_2m"}], ids=str)
def test_no_host_sync_in_the_denoising_loop(
    tiny_sd: Callable[..., Any], dtype: torch.dtype, scheduler: dict[str, Any]
) -> None:
    pipe = tiny_sd().to("cuda", dtype)
    trainable(pipe)
    sampler = Sampler(pipe, SamplingConfig(steps=4, **scheduler), BackpropConfig(strategy="uniform"))
    noise = sampler.noise(PROMPTS, seed=0, step=0)
    sampler.sample(PROMPTS, noise)  # encodes prompts and measures a step, once
    noise = replace(noise, initial=noise.initial.cuda(), steps=None if noise.steps is None else noise.steps.cuda())
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        out = sampler.sample(PROMPTS, noise)
        leaf = out.latents.detach().requires_grad_()
        sampler.decode(leaf).sum().backward()
        assert leaf.grad is not None
        sampler.backward(out, leaf.grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("batch", "limit", "expected"),
    [(16, 7, 4), (16, 16, 16), (4, 100, 4), (12, 5, 4), (13, 7, 7), (7, 3, 3), (5, 0, 1)],
)
def test_parts_of_a_batch_have_the_same_size_if_that_costs_little(batch: int, limit: int, expected: int) -> None:
    assert part_of(batch, limit) == expected
