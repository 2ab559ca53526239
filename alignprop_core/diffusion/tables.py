"""The noise tables of diffusers' schedulers: made once for a number of steps, or refused with a clear message."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from alignprop_core.errors import ModelError, complaint


def diffusers_tables(kind: type, config: Mapping[str, Any], steps: int) -> Any:
    """Return a scheduler of diffusers with its tables for so many steps.

    Args:
        kind: the scheduler's class.
        config: its options.
        steps: number of denoising steps T.

    Raises:
        ModelError: diffusers refuses the options, or there are fewer timesteps than `steps`.
    """
    try:
        with warnings.catch_warnings():
            # diffusers passes tensors to numpy, whose version 2 warns about torch.
            warnings.filterwarnings("ignore", message="__array__ implementation", category=DeprecationWarning)
            table: Any = kind(**config)
            trained = int(table.config.num_train_timesteps)
            most = int(table.config.get("original_inference_steps", trained))
            if steps <= most:
                table.set_timesteps(steps)
    except (ValueError, TypeError, ArithmeticError, RuntimeError, ImportError) as error:
        raise ModelError(f"The model's scheduler_config.json cannot be used: {complaint(error)}.") from error
    if steps > most and most < trained:
        raise ModelError(
            f"sampling.steps is {steps}, but lcm chooses its steps among {most} (original_inference_steps in the "
            "model's scheduler_config.json); use at most that many."
        )
    # "leading" with an offset of 1 begins beyond the last timestep if every timestep is a step.
    if steps > trained or not 0 <= int(table.timesteps.min()) <= int(table.timesteps.max()) < trained:
        raise ModelError(
            f"sampling.steps is {steps}, but the model was trained with {trained} timesteps; use at most that "
            f"many, with this model's timestep_spacing ({table.config.timestep_spacing}) fewer."
        )
    return table


def require_signal(prediction_type: str, alphas: Iterable[float | Tensor]) -> None:
    """Raise `ModelError` if noise is predicted from latents that are noise alone, one of `alphas` being 0."""
    if prediction_type == "epsilon" and any(alpha == 0 for alpha in alphas):
        raise ModelError(
            "The model's scheduler has zero terminal SNR (rescale_betas_zero_snr) and begins at pure noise, from "
            "which a prediction of the noise (prediction_type: epsilon) says nothing about the image: its images "
            "would be NaN. Correct prediction_type in its scheduler_config.json (v_prediction), or the other key."
        )
