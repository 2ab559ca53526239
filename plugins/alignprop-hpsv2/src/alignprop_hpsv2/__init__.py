"""Human Preference Score v2 as a reward. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from alignprop_core.hookspecs import hookimpl
from alignprop_core.specs import RewardSpec
from alignprop_hpsv2.published import DEFAULT_VERSION, WEIGHTS


@hookimpl
def alignprop_register_rewards() -> Iterable[RewardSpec]:
    """Register the preference score."""
    return [
        RewardSpec(
            name="hpsv2",
            summary="Human preference for a prompt: Human Preference Score v2, cosine under a fine-tuned CLIP-H.",
            factory="alignprop_hpsv2.reward:Hpsv2",
            config="alignprop_hpsv2.config:Hpsv2Config",
            needs_prompts=True,
            unit="cosine",
            typical_range=(0.15, 0.35),
            source="https://github.com/tgxs002/HPSv2",
            citation="Wu et al., Human Preference Score v2, arXiv:2306.09341",
            license="Apache-2.0",
            weights=(WEIGHTS[DEFAULT_VERSION],),
        )
    ]
