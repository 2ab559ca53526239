"""Euler, Euler ancestral, DPM-Solver++ (2M) and LCM against diffusers' own: steps, images, and plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from alignprop_core.config.model import BackpropConfig, SamplingConfig
from alignprop_core.config.schedulers import SCHEDULERS
from alignprop_core.diffusion.families.scheduler_config import solver_options
from alignprop_core.diffusion.finite import find_in_images
from alignprop_core.diffusion.noise import Noise
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.diffusion.schedulers import step_sizes
from alignprop_core.diffusion.solvers import Solver
from alignprop_core.diffusion.truncation import Truncation, draw_truncation
from alignprop_core.errors import ModelError
from alignprop_core.lora import adapters
from alignprop_core.testing import tiny_pipeline

# diffusers passes tensors to numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PUBLISHED = {**BETAS, "_class_name": "DDIMScheduler", "timestep_spacing": "leading", "steps_offset": 1}
V, X = {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}
TRAILING, LINSPACE = {"timestep_spacing": "trailing"}, {"timestep_spacing": "linspace"}
ZERO_SNR = {**TRAILING, **V, "rescale_betas_zero_snr": True}
NAMES = ("euler", "euler_a", "dpmpp_2m", "dpmpp_2m_karras", "lcm")
PROMPTS = ["a fox", "two owls"]


class _InFloat64:
    """torch as diffusers' schedulers see it, so that they do not round latents to float32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    for file in ("euler_discrete", "euler_ancestral_discrete", "dpmsolver_multistep"):
        monkeypatch.setattr(f"diffusers.schedulers.scheduling_{file}.torch", _InFloat64())


def theirs_of(name: str, config: dict[str, Any]) -> Any:
    """Return diffusers' scheduler, by the option that its name stands for, with its tables in float64."""
    named = {"dpmpp_2m_karras": {"use_karras_sigmas": True}}.get(name, {})
    made = getattr(diffusers, SCHEDULERS[name][0]).from_config(config, **named)
    original = made.set_timesteps

    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        for table in {"sigmas", "alphas_cumprod"} & set(vars(made)):
            setattr(made, table, getattr(made, table).double())

    made.set_timesteps = set_timesteps
    if hasattr(made, "get_scalings_for_boundary_condition_discrete"):
        scalings = made.get_scalings_for_boundary_condition_discrete
        made.get_scalings_for_boundary_condition_discrete = lambda t: scalings(int(t))  # not of a float32 tensor
    return made


def ours_of(name: str, config: dict[str, Any], steps: int) -> Solver:
    return Solver(getattr(diffusers, SCHEDULERS[name][0]), solver_options(config, name), steps)


def drawn(seed: int, count: int) -> Tensor:
    return torch.randn(count, 1, 4, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("name", "steps", "options"),
    [
        ("euler", 5, {}),
        ("euler", 4, {**X, **LINSPACE}),
        ("euler", 4, ZERO_SNR),
        ("euler", 6, {"use_karras_sigmas": True, **LINSPACE}),
        ("euler", 4, {"final_sigmas_type": "sigma_min", **TRAILING, "interpolation_type": "log_linear"}),
        ("euler", 1, TRAILING),
        ("euler_a", 5, LINSPACE),
        ("euler_a", 4, ZERO_SNR),
        ("euler_a", 1, TRAILING),
        ("dpmpp_2m", 6, {}),
        ("dpmpp_2m", 16, V),
        ("dpmpp_2m", 16, {"final_sigmas_type": "sigma_min", **LINSPACE}),
        ("dpmpp_2m", 16, {"final_sigmas_type": "sigma_min", "euler_at_final": True, "solver_type": "heun"}),
        ("dpmpp_2m", 5, {"final_sigmas_type": "sigma_min", **X, "solver_type": "heun", "solver_order": 3}),
        ("dpmpp_2m", 5, {"lower_order_final": False, **ZERO_SNR}),
        ("dpmpp_2m_karras", 7, LINSPACE),
        ("dpmpp_2m_karras", 16, {"final_sigmas_type": "sigma_min", **V}),
        ("lcm", 4, {}),
        ("lcm", 3, {**V, "timestep_scaling": 0.01, "rescale_betas_zero_snr": True}),
        ("lcm", 3, {**X, "original_inference_steps": 20, "timestep_scaling": 0.01}),
        ("lcm", 1, {}),
    ],
    ids=str,
)
def test_every_step_equals_diffusers_own(name: str, steps: int, options: dict[str, Any]) -> None:
    """In float64, over a whole chain: diffusers' latents are ours divided by alpha, and its network input ours."""
    config = {**PUBLISHED, **options}
    ours = ours_of(name, config, steps)
    # The name decides: 2M is of order 2, and without Karras' sigmas.
    named = {"solver_order": 2} if name.startswith("dpm") else {}
    theirs = theirs_of(name, {**config, **named})
    theirs.set_timesteps(steps)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    predictions, first = drawn(0, steps), drawn(1, 1)[0]
    mine, other, state = first * ours.initial_scale, first * theirs.init_noise_sigma, ours.initial_state
    generator, again = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    for i, t in enumerate(theirs.timesteps):
        torch.testing.assert_close(mine, theirs.scale_model_input(other, t), rtol=1e-9, atol=1e-9)
        clean = ours.clean(mine, predictions[i], i)
        noise = torch.randn(first.shape, generator=generator, dtype=torch.float64) if ours.needs_noise else None
        mine, state = ours.step(mine, predictions[i], i, state, noise)
        result = theirs.step(predictions[i], t, other, generator=again)
        other = result.prev_sample
        for estimate in ("pred_original_sample", "denoised"):
            if estimate in result:
                torch.testing.assert_close(clean, result[estimate], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", NAMES)
def test_slopes_and_step_sizes_are_derivatives(name: str, prediction_type: str) -> None:
    scheduler = ours_of(name, {**PUBLISHED, "prediction_type": prediction_type}, 5)
    predictions, latents, state = drawn(0, 5).requires_grad_(), drawn(1, 1)[0], scheduler.initial_state
    noise = drawn(2, 5)
    for i in range(5):
        leaf = latents.detach().requires_grad_()
        result, _ = scheduler.step(leaf, predictions[i], i, tuple(s.detach() for s in state), noise[i])
        (expected,) = torch.autograd.grad(result.sum(), leaf)
        slope = scheduler.slope(i)
        assert (slope is None) == (name.startswith("dpm") and 0 < i < 4)
        if slope is not None:
            torch.testing.assert_close(torch.full_like(expected, slope), expected)
        latents, state = scheduler.step(latents, predictions[i], i, state, noise[i])
    (moved,) = torch.autograd.grad(latents.sum(), predictions)
    torch.testing.assert_close(moved[:, 0, 0, 0, 0], torch.tensor(step_sizes(scheduler), dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_latents_with_the_true_noise_predicted_reach_every_level(name: str) -> None:
    """From renoised clean latents, every step that adds no noise ends on the same line between image and noise."""
    scheduler = ours_of(name, {**PUBLISHED, "timestep_scaling": 1e6}, 6)  # LCM's boundary correction is far from 1e6
    image, noise = drawn(0, 2)
    latents, state = scheduler.renoise(image, 0, noise), scheduler.initial_state
    for i in range(6):
        torch.testing.assert_close(latents, scheduler.renoise(image, i, noise), rtol=0, atol=1e-6)
        torch.testing.assert_close(scheduler.clean(latents, noise, i), image, rtol=0, atol=1e-5)
        latents, state = scheduler.step(latents, noise, i, state, None)
    torch.testing.assert_close(latents, image, rtol=0, atol=1e-5)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_dpm_solver_without_a_history_is_of_first_order(final: str) -> None:
    """As a low-variance sample takes it, after the chain has ended."""
    config = {**PUBLISHED, "final_sigmas_type": final}
    dpm, euler = (ours_of(name, config | LINSPACE, 16) for name in ("dpmpp_2m", "euler"))
    theirs = theirs_of("dpmpp_2m", config | LINSPACE)
    theirs.set_timesteps(16)
    latents, prediction = drawn(0, 2)
    theirs._step_index = 15
    expected = theirs.step(prediction, theirs.timesteps[15], latents).prev_sample
    assert dpm.slope(15) is not None if final == "zero" else dpm.slope(15) is None
    torch.testing.assert_close(dpm.step(latents, prediction, 15, (), None)[0], expected, rtol=1e-6, atol=1e-6)
    assert euler.initial_state == ()


# -- images -----------------------------------------------------------------------------------------------------------


def images(pipe: Any, name: str, steps: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the images of the sampler, and of the pipeline with diffusers' scheduler from the same config."""
    start, guidance = torch.Generator().manual_seed, options.pop("guidance", 4.0)
    own = pipe.scheduler
    with torch.no_grad():
        sampler = Sampler(pipe, SamplingConfig(steps=steps, guidance_scale=guidance, scheduler=name))
        ours = sampler(PROMPTS, generator=start(3))
    pipe.scheduler = getattr(diffusers, SCHEDULERS[name][0]).from_config(own.config, **options)
    theirs = pipe(
        PROMPTS, num_inference_steps=steps, guidance_scale=guidance, generator=start(3), output_type="pt"
    ).images
    pipe.scheduler = own
    return ours, theirs


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.parametrize(
    ("name", "steps", "options"),
    [
        ("euler", 5, {}),
        ("euler_a", 5, {}),
        ("dpmpp_2m", 5, {}),
        ("dpmpp_2m_karras", 5, {"use_karras_sigmas": True}),
        ("lcm", 4, {}),
    ],
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_image_equals_diffusers_own_pipeline(
    tiny_sd: Callable[..., Any], name: str, steps: int, options: dict[str, Any], prediction_type: str
) -> None:
    ours, theirs = images(tiny_sd(prediction_type=prediction_type), name, steps, **options)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.parametrize(
    ("saved", "name"), [("DDIMScheduler", "euler"), ("PNDMScheduler", "euler_a"), ("EulerDiscreteScheduler", "euler")]
)
def test_defaults_that_the_models_file_leaves_out_are_the_new_class_own(
    tiny_sd: Callable[..., Any], saved: str, name: str
) -> None:
    """As `from_config` decides, such as the spacing; not what the pipeline runs with as its own class."""
    pipe = tiny_sd()
    pipe.scheduler = getattr(diffusers, saved)(**BETAS)
    pipe = type(pipe)(**pipe.components, requires_safety_checker=False)  # corrects steps_offset in the config
    pipe.set_progress_bar_config(disable=True)
    ours, theirs = images(pipe, name, 4)
    if saved == SCHEDULERS[name][0]:
        theirs = pipe(
            PROMPTS,
            num_inference_steps=4,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(3),
            output_type="pt",
        ).images
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tuned(tiny_sd: Callable[..., Any]) -> tuple[Any, list[torch.nn.Parameter]]:
    pipe = tiny_sd().to(torch.float64)
    return pipe, attached(pipe)


def attached(pipe: Any) -> list[torch.nn.Parameter]:
    """Attach an adapter whose B is not zero."""
    parameters = adapters.attach(pipe.unet, rank=2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters[1::2]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return parameters


def by_definition(sampler: Sampler, scheduler: Any, noise: Noise, plan: Truncation) -> Tensor:
    """Return the final latents with one graph, by diffusers' own scheduler: (B * (1 + n), C, h, w)."""
    conditioning, steps = sampler.conditioning(PROMPTS), sampler.scheduler.steps
    scheduler.set_timesteps(steps)
    latents = noise.initial * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        weight, scale = plan.factors.get(i, (0.0, 0.0))
        inputs = scheduler.scale_model_input(latents, t)
        prediction = sampler.family.predict(scale * inputs + (1 - scale) * inputs.detach(), t, conditioning)
        prediction = prediction.detach() + weight * (prediction - prediction.detach())
        if i < plan.first:
            latents = latents.detach()
            if hasattr(scheduler, "model_outputs"):
                scheduler.model_outputs = [out if out is None else out.detach() for out in scheduler.model_outputs]
        result = scheduler.step(prediction, t, latents)
        if i == plan.stop_at:
            estimate: Tensor = result["denoised" if "denoised" in result else "pred_original_sample"]
            return estimate
        latents = result.prev_sample
    rows = [latents]
    for fresh in () if noise.lv is None else noise.lv:
        scheduler.set_timesteps(steps)
        t = scheduler.timesteps[-1]
        again = scheduler.add_noise(latents.detach(), fresh, t.repeat(len(PROMPTS)))
        prediction = sampler.family.predict(scheduler.scale_model_input(again, t), t, conditioning)
        rows.append(scheduler.step(prediction, t, again).prev_sample)
    return torch.cat(rows)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("name", "steps", "backprop"),
    [
        ("dpmpp_2m", 5, {"strategy": "full"}),
        ("dpmpp_2m", 6, {"strategy": "last_k", "k": 3, "checkpoint_steps": True}),
        ("dpmpp_2m", 6, {"strategy": "bernoulli"}),
        ("dpmpp_2m_karras", 6, {"strategy": "drtune", "k": 3}),
        ("dpmpp_2m", 5, {"strategy": "last_k", "k": 1, "lv_samples": 2}),
        ("dpmpp_2m", 5, {"strategy": "sparse"}),
        ("dpmpp_2m", 6, {"strategy": "leap"}),
        ("euler", 4, {"strategy": "full"}),
        ("euler", 5, {"strategy": "bridge", "k": 3}),
        ("euler", 5, {"strategy": "refl", "refl_steps": 3}),
        ("euler", 5, {"strategy": "last_k", "k": 1, "lv_samples": 2}),
        ("euler_a", 4, {"strategy": "full"}),
        ("euler_a", 5, {"strategy": "bernoulli"}),
        ("lcm", 4, {"strategy": "full"}),
        ("lcm", 4, {"strategy": "refl", "refl_steps": 3}),
        ("lcm", 4, {"strategy": "last_k", "k": 1, "lv_samples": 1}),
    ],
    ids=lambda value: value["strategy"] + "-lv" * ("lv_samples" in value) if isinstance(value, dict) else str(value),
)
def test_gradient_equals_plain_autograd_through_diffusers_steps(
    tuned: tuple[Any, list[torch.nn.Parameter]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    steps: int,
    backprop: dict[str, Any],
) -> None:
    pipe, parameters = tuned
    sampling = SamplingConfig(steps=steps, guidance_scale=2.0, scheduler=name)
    sampler = Sampler(pipe, sampling, BackpropConfig.model_validate(backprop))
    noise = sampler.noise(PROMPTS, seed=2, step=1)
    plan = draw_truncation(sampler.backprop, sampler.step_sizes, seed=2, step=1)
    scheduler = theirs_of(name, pipe.scheduler.config)
    fresh = iter(() if noise.steps is None else noise.steps)
    for file in ("euler_ancestral_discrete", "lcm"):
        monkeypatch.setattr(f"diffusers.schedulers.scheduling_{file}.randn_tensor", lambda *_, **__: next(fresh))
    latents = by_definition(sampler, scheduler, noise, plan)
    ascent = torch.linspace(-1, 1, latents.numel(), dtype=latents.dtype).view_as(latents).cos()
    out = sampler.sample(PROMPTS, noise)
    torch.testing.assert_close(out.latents.detach(), latents.detach(), rtol=1e-9, atol=1e-9)
    expected = torch.autograd.grad((ascent * latents).sum(), parameters)
    found = torch.autograd.grad((ascent * out.latents).sum(), parameters)
    scale = max(float(part.norm()) for part in expected)
    assert scale > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * scale)


@pytest.mark.parametrize("name", ["euler", "lcm"])
def test_the_search_for_values_that_are_not_finite_follows_the_chain(tiny_sd: Callable[..., Any], name: str) -> None:
    pipe = tiny_sd()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    sampler = Sampler(pipe, SamplingConfig(steps=3, scheduler=name))
    noise = sampler.noise(PROMPTS)
    with torch.no_grad():
        expected = sampler.sample(PROMPTS, noise).latents
    torch.testing.assert_close(find_in_images(sampler, PROMPTS, noise)[1], expected)


# -- models of few steps ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("family", "name", "steps", "spacing"),
    [
        ("stable_diffusion_xl", "euler_a", 1, "trailing"),  # SDXL Turbo
        ("stable_diffusion_xl", "euler", 4, "trailing"),  # SDXL Lightning
        ("stable_diffusion", "lcm", 4, "leading"),
    ],
)
def test_full_through_few_steps_equals_autograd_through_the_pipelines_own_call(
    family: str, name: str, steps: int, spacing: str
) -> None:
    pipe: Any = tiny_pipeline(family)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing)
    ours, theirs = images(pipe, name, steps, guidance=1.0)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)

    pipe = pipe.to(torch.float64)
    parameters = attached(pipe)
    sampling = SamplingConfig(steps=steps, guidance_scale=1.0, scheduler=name)
    sampler = Sampler(pipe, sampling, BackpropConfig(strategy="full"))
    found = sampler(PROMPTS, generator=torch.Generator().manual_seed(3))
    pipe.scheduler = theirs_of(name, pipe.scheduler.config)
    call: Any = type(pipe).__call__
    latents = call.__wrapped__(
        pipe,
        PROMPTS,
        num_inference_steps=steps,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    )
    pixels = pipe.vae.decode(latents.images / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    weights = torch.linspace(-1, 1, pixels.numel(), dtype=pixels.dtype).view_as(pixels).cos()
    torch.testing.assert_close(found.detach(), pixels.detach().clamp(0, 1), rtol=0, atol=1e-9)
    expected = torch.autograd.grad((weights * pixels).sum(), parameters)
    actual = torch.autograd.grad((weights * found).sum(), parameters)
    scale = max(float(part.norm()) for part in expected)
    assert scale > 0
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * scale)


# -- options ----------------------------------------------------------------------------------------------------------


def test_the_name_decides_between_karras_sigmas_and_the_models_timesteps() -> None:
    config = {**PUBLISHED, "_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}
    plain = solver_options({**config, "use_karras_sigmas": True}, "dpmpp_2m")
    karras = solver_options({**config, "use_lu_lambdas": True}, "dpmpp_2m_karras")
    assert (plain["use_karras_sigmas"], karras["use_karras_sigmas"], karras["use_lu_lambdas"]) == (False, True, False)
    assert plain["algorithm_type"] == karras["algorithm_type"] == "dpmsolver++"


def test_betas_that_the_models_file_leaves_out_stay_those_of_its_class() -> None:
    """LCM's own defaults are other betas, which the model was not trained with."""
    config = {**DDIMScheduler().config, "clip_sample": False, "_class_name": "DDIMScheduler"}
    options = solver_options(config, "lcm")
    assert (options["beta_start"], options["beta_schedule"]) == (0.0001, "linear")
    assert "timestep_spacing" not in options


@pytest.mark.parametrize(
    ("name", "options", "steps", "message"),
    [
        ("lcm", {"clip_sample": True}, 4, "clips the clean estimate .*does not do with lcm"),
        ("lcm", {}, 51, r"sampling\.steps is 51, but lcm chooses its steps among 50 \(original_inference_steps"),
        ("lcm", {"rescale_betas_zero_snr": True}, 4, "zero terminal SNR"),
        ("euler", {}, 1000, r"timestep_spacing \(leading\) fewer"),
        ("dpmpp_2m", {}, 1000, "two have the same noise level"),
        ("euler", {"final_sigmas_type": "none"}, 4, "cannot be used: ValueError"),
        ("euler", {"thresholding": True}, 4, "dynamic thresholding"),
        ("euler_a", {"prediction_type": "flow_prediction"}, 4, "is for flow matching"),
    ],
)
def test_what_a_scheduler_cannot_honor_is_refused(name: str, options: dict[str, Any], steps: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ours_of(name, {**PUBLISHED, **options}, steps)
