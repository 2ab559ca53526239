"""CLIP architectures: an open_clip model config with its preprocessing, built without fetching a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from torch import nn

from alignprop_clip import published
from alignprop_clip.header_schema import parse_header
from alignprop_clip.preprocess import Preprocess
from alignprop_clip.published import Settings
from alignprop_core.errors import ConfigError, complaint


@dataclass(frozen=True)
class Architecture:
    """A CLIP model without its weights.

    Attributes:
        name: name used in messages.
        config: open_clip's model config: embed_dim, vision_cfg, text_cfg, and any other key of open_clip's.
        preprocess: image preprocessing of the model.
        settings: where preprocessing and activation come from; None if a weights file stores them in its header.
    """

    name: str
    config: Mapping[str, Any]
    preprocess: Preprocess
    settings: Settings | None = None

    @classmethod
    def from_name(
        cls, name: str, *, pretrained: str | None = None, weights: str = "", quick_gelu: bool | None = None
    ) -> Architecture:
        """Return the architecture of an open_clip model, with the preprocessing and activation of its weights.

        Args:
            name: open_clip's model name; "ViT-L/14" is accepted for "ViT-L-14".
            pretrained: open_clip's tag of the weights; None to recognize them by `weights`.
            weights: the option `weights`, see `published.settings`.
            quick_gelu: whether to use QuickGELU; None decides by the weights.

        Raises:
            ConfigError: open_clip has no such model or no weights with that tag, or the model's text tower, decoder or
                input size is not supported.
        """
        import open_clip

        clean = name.replace("/", "-")
        if ":" in clean or clean not in open_clip.list_models():
            known = {model.lower(): model for model in open_clip.list_models()}
            nearest = get_close_matches(clean.lower(), known, n=1)
            hint = f' Did you mean "{known[nearest[0]]}"?' if nearest else ""
            raise ConfigError(
                f'open_clip has no model "{name}".{hint} '
                "`python -c 'import open_clip; print(open_clip.list_models())'` lists all models."
            )
        found = published.settings(clean, pretrained=pretrained, weights=weights)
        architecture = cls(clean, open_clip.get_model_config(clean), _preprocess(clean, found))
        architecture._check_supported()
        return architecture.with_settings(found, quick_gelu=quick_gelu)

    def with_settings(self, settings: Settings, *, quick_gelu: bool | None = None) -> Architecture:
        """Return the same architecture with other preprocessing and activation.

        Args:
            settings: the settings.
            quick_gelu: replaces the activation of the settings, unless it is None.
        """
        if quick_gelu is not None:
            assumed = tuple(option for option in settings.assumed if option != "quick_gelu")
            settings = replace(settings, quick_gelu=quick_gelu, assumed=assumed)
        config = dict(self.config)
        if settings.quick_gelu != config.get("quick_gelu", False):
            config["quick_gelu"] = settings.quick_gelu
        return Architecture(self.name, config, _preprocess(self.name, settings), settings)

    @classmethod
    def from_header(cls, header: Mapping[str, Any], where: str) -> Architecture:
        """Return the architecture stored in the header of a weights file.

        Args:
            header: {"open_clip": {...}, "image_size": N, "mean": [3], "std": [3]}, and optionally "resize" (default
                "shortest") and "interpolation" (default "bicubic").
            where: the file, for messages.

        Raises:
            WeightsError: a key is missing or has an invalid value.
        """
        parsed = parse_header(header, where)
        preprocess = Preprocess(
            size=parsed.image_size,
            mean=tuple(parsed.mean),
            std=tuple(parsed.std),
            resize=parsed.resize,
            interpolation=parsed.interpolation,
        )
        return cls(where, dict(header["open_clip"]), preprocess)

    def build_empty(self) -> nn.Module:
        """Build the model with its parameters on the meta device, which takes no memory; buffers are real.

        The hybrid models of timm (ViTamin, MobileCLIP-B) have real parameters with random values: timm runs their
        convolutional stem while it builds them, to learn the size of its output.

        Raises:
            ConfigError: this kind of model is not supported, or open_clip rejects the config.
        """
        from accelerate import init_empty_weights
        from open_clip import CLIP, CustomTextCLIP

        self._check_supported()
        config = deepcopy(dict(self.config))
        if "timm_model_name" in config["vision_cfg"]:
            config["vision_cfg"]["timm_model_pretrained"] = False
        kind: type[nn.Module] = CustomTextCLIP if config.pop("custom_text", False) else CLIP
        try:
            with init_empty_weights(include_buffers=False), suppress(RuntimeError):
                return kind(**deepcopy(config))
            return kind(**config)
        except Exception as error:  # open_clip and timm raise many types for a config they do not expect
            raise ConfigError(
                f"{self.name}: open_clip cannot build a model from this config: {complaint(error)}. Correct the "
                "config, or choose other weights."
            ) from error

    def _check_supported(self) -> None:
        if "multimodal_cfg" in self.config:
            raise ConfigError(
                f"{self.name} is a captioning model (CoCa), which is not supported. Choose a contrastive model, such "
                "as ViT-L-14."
            )
        if "hf_model_name" in self.config["text_cfg"]:
            raise ConfigError(
                f"{self.name} has a text tower from transformers, which cannot be built without the hub. Choose a "
                "model with open_clip's own text tower, such as ViT-L-14."
            )


def _preprocess(name: str, settings: Settings) -> Preprocess:
    """Return the preprocessing of an open_clip model with the settings of its weights."""
    import open_clip

    size = open_clip.get_model_config(name)["vision_cfg"].get("image_size", 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    if height != width:
        raise ConfigError(
            f"{name} takes images of {height}x{width} pixels; only models with square input are supported. Choose "
            "another model, such as ViT-L-14."
        )
    return Preprocess(
        size=int(height),
        mean=settings.mean,
        std=settings.std,
        resize=settings.resize,
        interpolation=settings.interpolation,
    )
