"""Published CLIP checkpoints: the files that `weights: default` loads for each model. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from alignprop_core.specs import WeightsFile


@dataclass(frozen=True)
class Pretrained:
    """A published checkpoint.

    Attributes:
        weights: the file on the hub.
        tag: open_clip's tag of these weights, which decides preprocessing and activation.
    """

    weights: WeightsFile
    tag: str


CLIP_SCORE_WEIGHTS = WeightsFile(repository="openai/clip-vit-large-patch14", file="model.safetensors", license="MIT")
PICKSCORE_WEIGHTS = WeightsFile(repository="yuvalkirstain/PickScore_v1", file="model.safetensors", license="MIT")
SIGLIP_WEIGHTS = WeightsFile(
    repository="timm/ViT-B-16-SigLIP", file="open_clip_pytorch_model.bin", license="Apache-2.0"
)
SIGLIP_TOKENIZER = tuple(
    WeightsFile(repository="timm/ViT-B-16-SigLIP", file=name, license="Apache-2.0")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
)


def _open_clip(repository: str, tag: str, license: str = "MIT") -> Pretrained:
    return Pretrained(WeightsFile(repository=repository, file="open_clip_pytorch_model.bin", license=license), tag)


PRETRAINED: dict[str, Pretrained] = {
    "ViT-L-14": Pretrained(CLIP_SCORE_WEIGHTS, "openai"),
    "ViT-B-32": _open_clip("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "laion2b_s34b_b79k"),
    "ViT-H-14": _open_clip("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "laion2b_s32b_b79k"),
    "ViT-B-16-SigLIP": Pretrained(SIGLIP_WEIGHTS, "webli"),
    "ViT-L-16-SigLIP-256": _open_clip("timm/ViT-L-16-SigLIP-256", "webli", "Apache-2.0"),
    "ViT-SO400M-14-SigLIP-384": _open_clip("timm/ViT-SO400M-14-SigLIP-384", "webli", "Apache-2.0"),
}
"""open_clip model name -> the checkpoint that "default" loads for it."""

PRETRAINED_SIGLIP = {name: checkpoint for name, checkpoint in PRETRAINED.items() if "SigLIP" in name}
"""The subset of `PRETRAINED` that was trained with the sigmoid loss and has a logit_bias."""
