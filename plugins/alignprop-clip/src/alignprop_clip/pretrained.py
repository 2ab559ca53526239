"""Published CLIP checkpoints: the files that `weights: default` loads for each model. Imports no torch.

A checkpoint does not record its activation function. OpenAI's models use x * sigmoid(1.702 x) ("QuickGELU"). If such
weights are loaded into a model with GELU, every shape fits and every score is wrong. This table therefore stores the
activation of each repository beside its file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from alignprop_core.specs import WeightsFile


@dataclass(frozen=True)
class Pretrained:
    """A published checkpoint.

    Attributes:
        weights: the file on the hub.
        quick_gelu: whether the model was trained with QuickGELU.
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


def _open_clip(repository: str, license: str) -> Pretrained:
    return Pretrained(WeightsFile(repository=repository, file="open_clip_pytorch_model.bin", license=license))


PRETRAINED: dict[str, Pretrained] = {
    "ViT-L-14": Pretrained(CLIP_SCORE_WEIGHTS, quick_gelu=True),
    "ViT-B-32": _open_clip("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "MIT"),
    "ViT-H-14": _open_clip("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "MIT"),
    "ViT-B-16-SigLIP": Pretrained(SIGLIP_WEIGHTS),
    "ViT-L-16-SigLIP-256": _open_clip("timm/ViT-L-16-SigLIP-256", "Apache-2.0"),
    "ViT-SO400M-14-SigLIP-384": _open_clip("timm/ViT-SO400M-14-SigLIP-384", "Apache-2.0"),
}
"""open_clip model name -> the checkpoint that "default" loads for it."""

PRETRAINED_SIGLIP = {name: checkpoint for name, checkpoint in PRETRAINED.items() if "SigLIP" in name}
"""The subset of `PRETRAINED` that was trained with the sigmoid loss and has a logit_bias."""


def trained_with_quick_gelu(weights: str) -> bool:
    """Return whether a `weights` option names OpenAI's own weights, all of which were trained with QuickGELU.

    The repository is read from hub:OWNER/NAME/FILE. For a local path it is read from a parent folder named OWNER--NAME,
    which is where `alignprop rewards fetch ... --to` stores the file.
    """
    if weights.startswith("hub:"):
        repository = weights.removeprefix("hub:").rpartition("/")[0]
    else:
        repository = PurePath(weights).parent.name.replace("--", "/")
    return repository.startswith(("openai/clip-", "timm/")) and (
        repository.startswith("openai/")
        or repository.endswith(("_clip.openai", "_clip_224.openai", "_clip_336.openai"))
    )
