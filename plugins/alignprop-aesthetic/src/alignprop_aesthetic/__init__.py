"""The LAION aesthetic predictor as a reward. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from alignprop_aesthetic.published import HEAD_WEIGHTS
from alignprop_clip.pretrained import CLIP_SCORE_WEIGHTS
from alignprop_core.hookspecs import hookimpl
from alignprop_core.specs import RewardSpec


@hookimpl
def alignprop_register_rewards() -> Iterable[RewardSpec]:
    """Register the aesthetic score."""
    return [
        RewardSpec(
            name="aesthetic",
            summary="Aesthetic rating by people, 1 to 10: LAION's aesthetic predictor v2 on CLIP ViT-L/14.",
            factory="alignprop_aesthetic.reward:Aesthetic",
            config="alignprop_aesthetic.config:AestheticConfig",
            unit="rating",
            typical_range=(3.0, 8.0),
            source="https://github.com/christophschuhmann/improved-aesthetic-predictor",
            citation="Schuhmann, LAION-Aesthetics predictor v2, 2022",
            license="Apache-2.0",
            weights=(HEAD_WEIGHTS, CLIP_SCORE_WEIGHTS),
        )
    ]
