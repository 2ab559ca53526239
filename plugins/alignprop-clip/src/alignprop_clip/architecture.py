"""What a CLIP model is made of, and the empty model built from it. No checkpoint is fetched for that, ever."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import nn

from alignprop_clip.header import read
from alignprop_clip.preprocess import Preprocess
from alignprop_core.errors import ConfigError


@dataclass(frozen=True)
class Architecture:
    """A CLIP model without its weights.

    Attributes:
        name: what it is called in messages.
        config: open_clip's model config: embed_dim, vision_cfg, text_cfg, and what else open_clip takes.
        preprocess: what its pictures go through.
    """

    name: str
    config: Mapping[str, Any]
    preprocess: Preprocess

    @classmethod
    def named(cls, name: str, *, quick_gelu: bool | None = None) -> Architecture:
        """Return one of open_clip's own models.

        Args:
            name: open_clip's name; "ViT-L/14" is taken as "ViT-L-14".
            quick_gelu: the activation; None leaves what open_clip's config says.

        Raises:
            ConfigError: open_clip has no such model, or one whose text tower or decoder is not supported.
        """
        import open_clip

        clean = name.replace("/", "-")
        if ":" in clean or clean not in open_clip.list_models():
            known = {model.lower(): model for model in open_clip.list_models()}
            near = get_close_matches(clean.lower(), known, n=1)
            hint = f' Did you mean "{known[near[0]]}"?' if near else ""
            raise ConfigError(
                f'open_clip has no model "{name}".{hint} '
                "`python -c 'import open_clip; print(open_clip.list_models())'` lists them."
            )
        config = open_clip.get_model_config(clean)
        if quick_gelu is not None:
            config["quick_gelu"] = quick_gelu
        image_size = config["vision_cfg"].get("image_size", 224)
        named = cls(clean, config, _preprocess(clean, image_size))
        named._check_supported()
        return named

    @classmethod
    def from_header(cls, header: Mapping[str, Any], where: str) -> Architecture:
        """Return the architecture a weights file says it has.

        Args:
            header: {"open_clip": {...}, "image_size": N, "mean": [3], "std": [3]}; "resize" and "interpolation" if
                they are not shortest and bicubic.
            where: the file, for messages.

        Raises:
            WeightsError: a key is missing or has a value that cannot be.
        """
        said = read(header, where)
        preprocess = Preprocess(
            size=said.image_size,
            mean=tuple(said.mean),
            std=tuple(said.std),
            resize=said.resize,
            interpolation=said.interpolation,
        )
        return cls(where, dict(header["open_clip"]), preprocess)

    def empty(self) -> nn.Module:
        """Build the model with its parameters on the meta device: no memory, no random numbers; buffers are real.

        Raises:
            ConfigError: a kind of model that is not supported, or a config open_clip refuses.
        """
        from accelerate import init_empty_weights
        from open_clip import CLIP, CustomTextCLIP

        self._check_supported()
        config = deepcopy(dict(self.config))
        if "timm_model_name" in config["vision_cfg"]:
            config["vision_cfg"]["timm_model_pretrained"] = False
        kind: type[nn.Module] = CustomTextCLIP if config.pop("custom_text", False) else CLIP
        try:
            with init_empty_weights(include_buffers=False):
                return kind(**config)
        except Exception as error:  # whatever open_clip and timm trip over in a config that is not theirs
            raise ConfigError(
                f"{self.name}: open_clip builds no model from its config: {type(error).__name__}: {error}"
            ) from error

    def _check_supported(self) -> None:
        if "multimodal_cfg" in self.config:
            raise ConfigError(f"{self.name} is a captioning model (CoCa); take a contrastive one, such as ViT-L-14.")
        if "hf_model_name" in self.config["text_cfg"]:
            raise ConfigError(
                f"{self.name} has a text tower from transformers, which cannot be built without the hub; take a model "
                "with open_clip's own, such as ViT-L-14."
            )


def _preprocess(name: str, image_size: Any) -> Preprocess:
    """Return what open_clip prepares pictures with for the published weights of a model, or CLIP's own way."""
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    tags = list_pretrained_tags_by_model(name)
    published = get_pretrained_cfg(name, tags[0]) if tags else {}
    height, width = image_size if isinstance(image_size, (list, tuple)) else (image_size, image_size)
    if height != width:
        raise ConfigError(f"{name} takes pictures of {height}x{width}; only square models are supported.")
    return Preprocess(
        size=int(height),
        mean=tuple(published.get("mean") or OPENAI_DATASET_MEAN),
        std=tuple(published.get("std") or OPENAI_DATASET_STD),
        resize=published.get("resize_mode") or "shortest",
        interpolation="bilinear" if published.get("interpolation") == "bilinear" else "bicubic",
    )
