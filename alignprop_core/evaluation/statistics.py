"""Means, spreads and paired intervals of scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import Any


def t_quantile(probability: float, degrees: int) -> float:
    """Return Student's t quantile; Abramowitz & Stegun 26.7.5, within 1% from 3 degrees of freedom on."""
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


def paired(base: Sequence[float], tuned: Sequence[float]) -> dict[str, Any]:
    """Return the mean of tuned - base over pairs and its 95% interval (Student's t; null for a single pair)."""
    differences = [b - a for a, b in zip(base, tuned, strict=True)]
    mean = fmean(differences)
    if len(differences) < 2:
        return {"difference": mean, "interval": None}
    half = t_quantile(0.975, len(differences) - 1) * stdev(differences) / math.sqrt(len(differences))
    return {"difference": mean, "interval": [mean - half, mean + half]}
