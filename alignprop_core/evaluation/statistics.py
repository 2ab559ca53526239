"""Means, standard deviations and paired confidence intervals of scores, clustered by prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import Any


def t_quantile(probability: float, degrees: int) -> float:
    """Return Student's t quantile, exact for 1 and 2 degrees of freedom, else within 1%.

    Abramowitz & Stegun 1964, equation 26.7.5: an expansion around the normal quantile in 1 / degrees.
    """
    # Closed forms where the expansion is too coarse.
    if degrees == 1:
        return math.tan(math.pi * (probability - 0.5))
    if degrees == 2:
        return (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    z, n = NormalDist().inv_cdf(probability), degrees
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )


def summary(scores: Sequence[float]) -> dict[str, Any]:
    """Return n, mean and sample standard deviation."""
    return {"n": len(scores), "mean": fmean(scores), "std": stdev(scores) if len(scores) > 1 else 0.0}


def prompt_means(scores: Sequence[float], images_per_prompt: int = 1) -> list[float]:
    """Return the mean score of each prompt's images; scores are in prompt order."""
    return [fmean(scores[start : start + images_per_prompt]) for start in range(0, len(scores), images_per_prompt)]


def paired(base: Sequence[float], tuned: Sequence[float], images_per_prompt: int = 1) -> dict[str, Any]:
    """Return the mean of tuned - base over pairs and its 95% confidence interval, clustered by prompt.

    Images of one prompt resemble each other, so they are not independent observations: the interval is
    mean +- t_{0.975, n - 1} s / sqrt(n) over the n prompts, with the standard deviation s of the prompts' mean
    differences; None for a single prompt.

    Args:
        base: scores in prompt order, `images_per_prompt` for each of n prompts.
        tuned: scores of the same prompts and noise, in the same order.
        images_per_prompt: images of each prompt.
    """
    differences = prompt_means([b - a for a, b in zip(base, tuned, strict=True)], images_per_prompt)
    mean = fmean(differences)
    if len(differences) < 2:
        return {"difference": mean, "interval": None}
    half = t_quantile(0.975, len(differences) - 1) * stdev(differences) / math.sqrt(len(differences))
    return {"difference": mean, "interval": [mean - half, mean + half]}
