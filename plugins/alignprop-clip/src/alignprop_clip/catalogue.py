"""The weights that `weights: default` stands for, model by model. Imports no torch.

A checkpoint does not say which activation its model was trained with. OpenAI's models use x * sigmoid(1.702 x)
("QuickGELU"); loaded into a model with GELU every shape fits and every score is wrong. So what is known of a
repository stands here beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from alignprop_core.specs import WeightsFile

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Known:
    """A published checkpoint.

    Attributes:
        weights: where it is.
        quick_gelu: whether its model was trained with QuickGELU.
    """

    weights: WeightsFile
    quick_gelu: bool = False


CLIP_SCORE_WEIGHTS = WeightsFile(repository="openai/clip-vit-large-patch14", file="model.safetensors", license="MIT")
PICKSCORE_WEIGHTS = WeightsFile(repository="yuvalkirstain/PickScore_v1", file="model.safetensors", license="MIT")
SIGLIP_WEIGHTS = WeightsFile(
    repository="timm/ViT-B-16-SigLIP", file="open_clip_pytorch_model.bin", license="Apache-2.0"
)
SIGLIP_TOKENIZER = tuple(
    WeightsFile(repository="timm/ViT-B-16-SigLIP", file=name, license="Apache-2.0")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
)


def _open_clip(repository: str, licence: str) -> Known:
    return Known(WeightsFile(repository=repository, file="open_clip_pytorch_model.bin", license=licence))


KNOWN: dict[str, Known] = {
    "ViT-L-14": Known(CLIP_SCORE_WEIGHTS, quick_gelu=True),
    "ViT-B-32": _open_clip("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "MIT"),
    "ViT-H-14": _open_clip("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "MIT"),
    "ViT-B-16-SigLIP": Known(SIGLIP_WEIGHTS),
    "ViT-L-16-SigLIP-256": _open_clip("timm/ViT-L-16-SigLIP-256", "Apache-2.0"),
    "ViT-SO400M-14-SigLIP-384": _open_clip("timm/ViT-SO400M-14-SigLIP-384", "Apache-2.0"),
}
"""open_clip model name -> the checkpoint "default" means for it."""

WITH_BIAS = {name: known for name, known in KNOWN.items() if "SigLIP" in name}
"""Those of them that were trained with the sigmoid loss, and have a logit_bias."""


def trained_with_quick_gelu(weights: str) -> bool:
    """Whether a `weights` option names a hub repository of OpenAI's own models, all trained with QuickGELU.

    A file in a folder OWNER--NAME, where `alignprop rewards fetch ... --to` puts it, is taken as of that repository.
    """
    if weights.startswith("hub:"):
        repository = weights.removeprefix("hub:").rpartition("/")[0]
    else:
        repository = PurePath(weights).parent.name.replace("--", "/")
    return repository.startswith(("openai/clip-", "timm/")) and (
        repository.startswith("openai/")
        or repository.endswith(("_clip.openai", "_clip_224.openai", "_clip_336.openai"))
    )
