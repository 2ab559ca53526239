"""The scheduler of a diffusion model: by its name, with the options in the scheduler config of a diffusers pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from inspect import signature
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler

from alignprop_core.config.model import SamplingConfig
from alignprop_core.config.schedulers import SCHEDULERS
from alignprop_core.diffusion.schedulers import DDIM, Scheduler
from alignprop_core.diffusion.solvers import Solver
from alignprop_core.errors import ModelError, did_you_mean

DIFFUSION = ("ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_karras", "lcm")
"""The schedulers for models with a table of betas; the first one is the default."""
_BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "num_train_timesteps", "prediction_type")
"""Options that describe the model, not the scheduler."""
_SOLVERS: dict[str, dict[str, Any]] = {
    "dpmpp_2m": {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": False},
    "dpmpp_2m_karras": {
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "use_karras_sigmas": True,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "use_lu_lambdas": False,
    },
}
"""Options that a scheduler's name decides."""
_VALUES = {
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
}
"""What the schedulers can compute; diffusers takes some other values for these."""
_MISSPELT = 0.88
"""How similar a misspelt key is; timestep_scaling (LCM) and timestep_spacing are two keys."""


def diffusion_scheduler(scheduler: Any, sampling: SamplingConfig, device: torch.device) -> Scheduler:
    """Return the scheduler of the `sampling` section over the noise tables of a pipeline's own scheduler.

    Raises:
        ModelError: the model needs another kind of scheduler, or the options cannot be used.
    """
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    name = sampling.scheduler or DIFFUSION[0]
    if name == "ddim":
        return DDIM(ddim_options(config), sampling.steps, eta=sampling.eta, device=device)
    return Solver(getattr(diffusers, SCHEDULERS[name][0]), solver_options(config, name), sampling.steps, device=device)


def solver_options(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the options of another scheduler in a pipeline's scheduler config, as its class's `from_config` does.

    What the config says is kept, what it leaves to defaults is left to those of the new class, such as the spacing of
    the timesteps; not so the betas, which the model was trained with. The name of the scheduler decides some options.

    Raises:
        ModelError: the model needs another kind of scheduler, or one that clips.
    """
    refuse_other_kinds(config)
    kind = SCHEDULERS[name][0]
    options = list(signature(getattr(diffusers, kind).__init__).parameters)[1:]
    left_out = () if config.get("_class_name") == kind else set(config.get("_use_default_values", ())) - set(_BETAS)
    found = {key: config[key] for key in options if key in config and key not in left_out} | _SOLVERS.get(name, {})
    if found.get("clip_sample"):
        raise ModelError(
            f"The model's scheduler clips the clean estimate (clip_sample), which alignprop does not do with {name}; "
            "set clip_sample to false in its scheduler_config.json, or sampling.scheduler to ddim."
        )
    return found


def ddim_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of diffusers' DDIM in a pipeline's scheduler config, of whatever class.

    These are the values the pipeline itself runs with; a scheduler without `clip_sample` (Euler, DPM++) does not clip.
    `DDIMScheduler.from_config` would replace those that are not in the model's file by its own defaults: other betas,
    an offset that the pipeline has corrected, clipped latents.

    Raises:
        ModelError: the model needs a scheduler that DDIM cannot replace.
    """
    refuse_other_kinds(config)
    options = list(signature(DDIMScheduler.__init__).parameters)[1:]
    return {"clip_sample": False, **{key: config[key] for key in options if key in config}}


def refuse_other_kinds(config: Mapping[str, Any]) -> None:
    """Refuse a scheduler config that is not for diffusion over a table of betas, and warn about misspelt keys.

    Raises:
        ModelError: the model needs another kind of scheduler.
    """
    options = list(signature(DDIMScheduler.__init__).parameters)[1:]
    kind, prediction = config.get("_class_name", "of its own class"), config.get("prediction_type", "not set")
    flow = config.get("use_flow_sigmas") or "flow" in f"{kind} {prediction}".lower()
    # In this mode the network's time is the logarithm of a noise level, not a number of a step.
    continuous = config.get("timestep_type") == "continuous" and prediction == "v_prediction"
    if flow or continuous or not {"beta_schedule", "beta_start", "trained_betas"} & set(config):
        why = "is for flow matching" if flow else "counts time continuously" if continuous else "has no table of betas"
        raise ModelError(
            f"The model's scheduler ({kind}, prediction_type: {prediction}) {why}. The schedulers for this family "
            f"need betas and one of the prediction_types {', '.join(_VALUES['prediction_type'])}. Another kind of "
            "model needs a family of its own, which a plugin can add."
        )
    for key, allowed in _VALUES.items():
        value = config.get(key, allowed[0])
        if value not in allowed:
            raise ModelError(
                f'The model\'s scheduler_config.json has {key}: "{value}"; '
                f"it must be one of {', '.join(allowed)}.{did_you_mean(str(value), allowed)}"
            )
    if config.get("thresholding"):
        raise ModelError(
            "The model's scheduler uses dynamic thresholding, whose quantile has no useful gradient; "
            "set thresholding to false in its scheduler_config.json."
        )
    for key in config:
        # Keys of other schedulers, such as solver_order, say nothing about the model. A misspelt key does.
        if key not in options and (meant := get_close_matches(key, options, n=1, cutoff=_MISSPELT)):
            warnings.warn(
                f'The model\'s scheduler_config.json has the key "{key}", which is ignored. Did you mean "{meant[0]}"?',
                stacklevel=2,
            )
