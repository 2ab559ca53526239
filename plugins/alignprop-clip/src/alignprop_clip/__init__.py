"""CLIP rewards: image-text agreement, human preference, and similarity to a folder of images. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from alignprop_clip.pretrained import CLIP_SCORE_WEIGHTS, PICKSCORE_WEIGHTS, SIGLIP_TOKENIZER, SIGLIP_WEIGHTS
from alignprop_core.hookspecs import hookimpl
from alignprop_core.specs import RewardSpec

_OPEN_CLIP = "https://github.com/mlfoundations/open_clip"


@hookimpl
def alignprop_register_rewards() -> Iterable[RewardSpec]:
    """Register the four rewards built on CLIP models."""
    return [
        RewardSpec(
            name="clip_score",
            summary="Image-prompt agreement: cosine similarity of a CLIP model's image and text embeddings.",
            factory="alignprop_clip.reward:ClipScore",
            config="alignprop_clip.config:ClipScoreConfig",
            needs_prompts=True,
            unit="cosine",
            typical_range=(0.1, 0.4),
            source=_OPEN_CLIP,
            citation="Hessel et al., CLIPScore, arXiv:2104.08718; Radford et al., CLIP, arXiv:2103.00020",
            license="Apache-2.0",
            weights=(CLIP_SCORE_WEIGHTS,),
        ),
        RewardSpec(
            name="pickscore",
            summary="Human preference for a prompt: PickScore, exp(logit_scale) times the cosine similarity of CLIP-H.",
            factory="alignprop_clip.reward:PickScore",
            config="alignprop_clip.config:PickScoreConfig",
            needs_prompts=True,
            unit="logit",
            typical_range=(17.0, 25.0),
            source="https://github.com/yuvalkirstain/PickScore",
            citation="Kirstain et al., Pick-a-Pic, arXiv:2305.01569",
            license="Apache-2.0",
            weights=(PICKSCORE_WEIGHTS,),
        ),
        RewardSpec(
            name="siglip_score",
            summary="Image-prompt agreement: a SigLIP model's logit, the scaled cosine similarity plus a bias.",
            factory="alignprop_clip.reward:SiglipScore",
            config="alignprop_clip.config:SiglipScoreConfig",
            needs_prompts=True,
            unit="logit",
            typical_range=(-17.0, 5.0),
            source=_OPEN_CLIP,
            citation="Zhai et al., Sigmoid Loss for Language Image Pre-Training, arXiv:2303.15343",
            license="Apache-2.0",
            weights=(SIGLIP_WEIGHTS, *SIGLIP_TOKENIZER),
        ),
        RewardSpec(
            name="reference_similarity",
            summary="Similarity to a folder of images: mean or maximum cosine similarity of CLIP image embeddings.",
            factory="alignprop_clip.reference:ReferenceSimilarity",
            config="alignprop_clip.config:ReferenceSimilarityConfig",
            unit="cosine",
            typical_range=(0.3, 0.9),
            source=_OPEN_CLIP,
            citation="Radford et al., CLIP, arXiv:2103.00020 (CLIP-I: Ruiz et al., DreamBooth, arXiv:2208.12242)",
            license="Apache-2.0",
            weights=(CLIP_SCORE_WEIGHTS,),
        ),
    ]
