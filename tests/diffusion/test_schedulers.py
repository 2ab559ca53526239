"""The scheduler config of a base model: every value decides what diffusers lets it decide, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from alignprop_core.config.model import SamplingConfig
from alignprop_core.diffusion.families.scheduler_config import ddim_options
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.diffusion.schedulers import DDIM
from alignprop_core.errors import ModelError

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
AS_PUBLISHED = {**BETAS, "timestep_spacing": "leading", "steps_offset": 1}
V_ZERO_SNR = {
    **AS_PUBLISHED,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def with_scheduler(pipe: Any, scheduler: Any) -> Any:
    """Return the pipeline with another scheduler, which its constructor corrects as for a model that is loaded."""
    made = StableDiffusionPipeline(**{**pipe.components, "scheduler": scheduler}, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def images(pipe: Any, steps: int, eta: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the images of the sampler and of the pipeline itself."""
    settings: dict[str, Any] = {"guidance_scale": 5.0, "eta": eta}
    start = torch.Generator().manual_seed
    theirs = pipe("a fox", num_inference_steps=steps, generator=start(3), output_type="pt", **settings).images
    with torch.no_grad():
        ours = Sampler(pipe, SamplingConfig(steps=steps, **settings))(["a fox"], generator=start(3))
    return ours, theirs


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.parametrize(
    "config",
    [
        AS_PUBLISHED,
        {},
        pytest.param(BETAS, marks=pytest.mark.slow),
        pytest.param({"timestep_spacing": "trailing"}, marks=pytest.mark.slow),
        {"trained_betas": [0.001 + n * 1e-5 for n in range(1000)]},
        pytest.param({**BETAS, "beta_schedule": "squaredcos_cap_v2"}, marks=pytest.mark.slow),
        pytest.param({**BETAS, "num_train_timesteps": 300}, marks=pytest.mark.slow),
        {**BETAS, "prediction_type": "sample", "set_alpha_to_one": False},
        {**AS_PUBLISHED, "rescale_betas_zero_snr": True},
    ],
    ids=lambda config: " ".join(config) or "nothing",
)
def test_image_is_the_pipelines_own_whatever_the_config_leaves_out(
    tiny_sd: Callable[..., Any], config: dict[str, Any]
) -> None:
    """The pipeline corrects two of DDIM's defaults, clip_sample and steps_offset, in the config that it keeps."""
    ours, theirs = images(with_scheduler(tiny_sd(), DDIMScheduler(**config)), steps=3)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of torch, with numpy 2
@pytest.mark.parametrize(
    "name",
    [
        "EulerDiscreteScheduler",
        pytest.param("DPMSolverMultistepScheduler", marks=pytest.mark.slow),
        pytest.param("PNDMScheduler", marks=pytest.mark.slow),
    ],
)
def test_schedulers_that_never_clip_are_replaced_by_one_that_does_not(tiny_sd: Callable[..., Any], name: str) -> None:
    """DDIM at eta 0 is Euler's method; the others are more accurate, and near it with many steps."""
    ours, theirs = images(with_scheduler(tiny_sd(), getattr(diffusers, name)(**AS_PUBLISHED)), steps=50)
    error = float((ours - theirs).abs().mean())
    assert error < (0.0003 if name == "EulerDiscreteScheduler" else 0.01)


@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "LCMScheduler", "DDPMScheduler", "PNDMScheduler"]
)
def test_another_class_keeps_its_own_defaults(name: str) -> None:
    """Not DDIM's: what a config leaves out was decided by the class it was written for."""
    scheduler = getattr(diffusers, name)()
    table = DDIM(ddim_options(scheduler.config), 10)
    spacing = scheduler.config.get("timestep_spacing", "leading")
    expected = DDIMScheduler(
        beta_start=scheduler.config.beta_start,
        beta_end=scheduler.config.beta_end,
        beta_schedule=scheduler.config.beta_schedule,
        timestep_spacing=spacing,
    )
    expected.set_timesteps(10)
    assert torch.equal(table.timesteps, expected.timesteps)
    latents, noise = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    level = (1 - expected.alphas_cumprod[table.timesteps[0]]).double() ** 0.5
    torch.testing.assert_close(table.renoise(latents, 0, noise).squeeze(), level)


def test_clipping_that_the_config_asks_for_is_kept(tiny_sd: Callable[..., Any]) -> None:
    pipe = tiny_sd()
    pipe.scheduler = DDIMScheduler(**AS_PUBLISHED, clip_sample=True, clip_sample_range=0.5)
    ours, theirs = images(pipe, steps=3)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"prediction_type": "v-prediction"}, r'prediction_type: "v-prediction".* Did you mean "v_prediction"'),
        ({"prediction_type": "noise"}, r"prediction_type.*one of epsilon, sample, v_prediction"),
        ({"prediction_type": "flow_prediction"}, r"flow_prediction.*epsilon, sample, v_prediction"),
        ({"use_flow_sigmas": True}, "flow matching"),
        ({"timestep_type": "continuous", "prediction_type": "v_prediction"}, "counts time continuously"),
        ({"timestep_spacing": "traling"}, r'one of leading, linspace, trailing\. Did you mean "trailing"'),
        ({"beta_schedule": "sigmoid"}, r'beta_schedule: "sigmoid"; it must be one of linear'),
        ({"beta_start": "much"}, r"scheduler_config\.json cannot be used: TypeError"),
        ({"thresholding": True}, "dynamic thresholding"),
        ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "zero terminal SNR"),
        ({"num_train_timesteps": 4}, "sampling.steps is 5, but the model was trained with 4"),
    ],
    ids=str,
)
def test_a_value_that_ddim_cannot_honor_is_refused(config: dict[str, Any], expected: str) -> None:
    with pytest.raises(ModelError, match=expected):
        DDIM(ddim_options({**AS_PUBLISHED, **config}), 5)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_a_scheduler_of_another_kind_is_refused_by_name(tiny_sd: Callable[..., Any], name: str) -> None:
    pipe = tiny_sd()
    pipe.scheduler = getattr(diffusers, name)()
    with pytest.raises(ModelError, match=name):
        Sampler(pipe, SamplingConfig(steps=2))


def test_a_misspelt_key_is_ignored_as_in_diffusers_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r'"predicton_type", which is ignored\. Did you mean "prediction_type"'):
        assert DDIM(ddim_options({**AS_PUBLISHED, "predicton_type": "v_prediction"}), 5).prediction_type == "epsilon"


def test_keys_of_other_schedulers_are_no_misspelling(recwarn: pytest.WarningsRecorder) -> None:
    known = {
        key
        for name in (*DDIMScheduler._compatibles, "LCMScheduler", "TCDScheduler", "SASolverScheduler")
        if name != "DPMSolverSDEScheduler"  # needs a package that is not installed
        for key in signature(getattr(diffusers, name).__init__).parameters
    }
    others = known - set(signature(DDIMScheduler.__init__).parameters)
    assert len(others) > 30
    DDIM(ddim_options({**AS_PUBLISHED, **dict.fromkeys(others)}), 5)
    assert not [str(warning.message) for warning in recwarn if "ignored" in str(warning.message)]


def test_as_many_steps_as_timesteps() -> None:
    """An offset of 1 begins beyond the last timestep, where diffusers raises an IndexError."""
    assert DDIM(ddim_options({**AS_PUBLISHED, "steps_offset": 0}), 1000).steps == 1000
    with pytest.raises(ModelError, match=r"sampling\.steps is 1000, .* timestep_spacing \(leading\) fewer"):
        DDIM(ddim_options(AS_PUBLISHED), 1000)


@pytest.mark.parametrize("steps", [4, 25, 50])
@pytest.mark.parametrize("final_one", [True, False])
def test_zero_terminal_snr_with_full_noise_is_finite_and_equals_diffusers_where_that_is(
    steps: int, final_one: bool
) -> None:
    config = {**V_ZERO_SNR, "clip_sample": False, "set_alpha_to_one": final_one}
    ours, theirs = DDIM(ddim_options(config), steps, eta=1.0), DDIMScheduler(**config)
    theirs.set_timesteps(steps)
    latents, noise, prediction = torch.randn(3, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    compared = 0
    for i, t in enumerate(theirs.timesteps):
        mine, _ = ours.step(latents, prediction, i, (), noise)
        assert mine.isfinite().all(), f"step {i}"
        expected = theirs.step(prediction, t, latents, eta=1.0, variance_noise=noise).prev_sample
        if expected.isfinite().all():
            assert torch.equal(mine, expected)
            compared += 1
    assert compared >= steps - 1


def test_a_step_without_noise_ends_at_the_same_noise_level() -> None:
    """As a low-variance sample takes it: the level is that of the scheduler, whatever eta is."""
    scheduler = DDIM(ddim_options({**AS_PUBLISHED, "set_alpha_to_one": False}), 50, eta=1.0)
    nothing, noise = torch.zeros(1, 4, 64, 64), torch.randn(2, 1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    # Latents that are noise alone: the prediction is exact, and the clean estimate is zero.
    latents = scheduler.renoise(nothing, 49, noise[0])
    without, _ = scheduler.step(latents, noise[0], 49, (), None)
    with_noise, _ = scheduler.step(latents, noise[0], 49, (), noise[1])
    assert float(without.std()) == pytest.approx(0.0292, rel=0.02)
    assert float(with_noise.std()) == pytest.approx(0.0292, rel=0.02)
