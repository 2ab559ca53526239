"""The options of DDIM in the scheduler config of a diffusers pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from inspect import signature
from typing import Any

from diffusers import DDIMScheduler

from alignprop_core.errors import ModelError, did_you_mean

_VALUES = {
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
}
"""What DDIM can compute; diffusers takes some other values for these."""
_MISSPELT = 0.88
"""How similar a misspelt key is; timestep_scaling (LCM) and timestep_spacing are two keys."""


def ddim_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of diffusers' DDIM in a pipeline's scheduler config, of whatever class.

    These are the values the pipeline itself runs with; a scheduler without `clip_sample` (Euler, DPM++) does not clip.
    `DDIMScheduler.from_config` would replace those that are not in the model's file by its own defaults: other betas,
    an offset that the pipeline has corrected, clipped latents.

    Raises:
        ModelError: the model needs a scheduler that DDIM cannot replace.
    """
    options = list(signature(DDIMScheduler.__init__).parameters)[1:]
    kind, prediction = config.get("_class_name", "of its own class"), config.get("prediction_type", "not set")
    flow = config.get("use_flow_sigmas") or "flow" in f"{kind} {prediction}".lower()
    # In this mode the network's time is the logarithm of a noise level, not a number of a step.
    continuous = config.get("timestep_type") == "continuous" and prediction == "v_prediction"
    if flow or continuous or not {"beta_schedule", "beta_start", "trained_betas"} & set(config):
        why = "is for flow matching" if flow else "counts time continuously" if continuous else "has no table of betas"
        raise ModelError(
            f"The model's scheduler ({kind}, prediction_type: {prediction}) {why}. alignprop samples with DDIM, which "
            f"needs betas and one of the prediction_types {', '.join(_VALUES['prediction_type'])}. Another kind of "
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
    return {"clip_sample": False, **{key: config[key] for key in options if key in config}}
