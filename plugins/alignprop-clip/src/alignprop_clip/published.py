"""Settings that published weights need: preprocessing and activation, from open_clip's registry.

A weights file stores neither. With the wrong ones every shape fits and every score is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, Literal

from alignprop_clip.preprocess import Resize
from alignprop_core.errors import ConfigError, did_you_mean

# Repositories with the same weights in transformers' layout -> open_clip's name and tag.
_OTHER_COPIES = {
    "openai/clip-vit-base-patch32": ("ViT-B-32", "openai"),
    "openai/clip-vit-base-patch16": ("ViT-B-16", "openai"),
    "openai/clip-vit-large-patch14": ("ViT-L-14", "openai"),
    "openai/clip-vit-large-patch14-336": ("ViT-L-14-336", "openai"),
    "facebook/metaclip-b32-400m": ("ViT-B-32", "metaclip_400m"),
    "facebook/metaclip-b32-fullcc2.5b": ("ViT-B-32", "metaclip_fullcc"),
    "facebook/metaclip-b16-400m": ("ViT-B-16", "metaclip_400m"),
    "facebook/metaclip-b16-fullcc2.5b": ("ViT-B-16", "metaclip_fullcc"),
    "facebook/metaclip-l14-400m": ("ViT-L-14", "metaclip_400m"),
    "facebook/metaclip-l14-fullcc2.5b": ("ViT-L-14", "metaclip_fullcc"),
    "facebook/metaclip-h14-fullcc2.5b": ("ViT-H-14", "metaclip_fullcc"),
}
# Names such as ViT-L-14.pt: OpenAI's own files are TorchScript, which is refused, so such a file is another one.
_GENERIC_NAMES = "openaipublic"


@dataclass(frozen=True)
class Settings:
    """Preprocessing and activation of published weights.

    Attributes:
        mean: value subtracted from each channel.
        std: value that divides each channel.
        resize: see `Preprocess`.
        interpolation: the resampling filter.
        quick_gelu: whether the model was trained with QuickGELU.
        source: the weights or the file the settings come from.
        recognized: whether they are those of the weights; False if the weights are not known.
        assumed: options (`pretrained`, `quick_gelu`) that decide settings which are not known for these weights.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize
    interpolation: Literal["bicubic", "bilinear"]
    quick_gelu: bool
    source: str
    recognized: bool = True
    assumed: tuple[str, ...] = ()


def settings(model: str, *, pretrained: str | None = None, weights: str = "") -> Settings:
    """Return the settings of an open_clip model with certain weights.

    Args:
        model: open_clip's model name.
        pretrained: open_clip's tag of the weights; None to recognize them by `weights`.
        weights: the option `weights`: hub:owner/name/file, or the path of a file. The repository is also recognized in
            a path, in a folder OWNER--NAME (`alignprop rewards fetch ... --to`) or models--OWNER--NAME (the hub cache).

    Raises:
        ConfigError: the model has no published weights with that tag.
    """
    if pretrained is not None:
        tag = _checked_tag(model, pretrained)
        return _from_registry(model, tag)
    known = _recognized(model, weights)
    return _from_registry(*known) if known else _assumed(model)


def tags(model: str) -> tuple[str, ...]:
    """Return open_clip's tags of the published weights of a model."""
    from open_clip import list_pretrained_tags_by_model

    return tuple(list_pretrained_tags_by_model(model))


def hub_files(model: str, pretrained: str) -> tuple[str, ...]:
    """Return the hub files, as hub:owner/name/file, that may contain the weights of a tag; the preferred one first.

    Raises:
        ConfigError: the model has no published weights with that tag.
    """
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
    from open_clip.pretrained import get_pretrained_cfg

    owner, name, file = get_pretrained_cfg(model, _checked_tag(model, pretrained))["hf_hub"].split("/")
    names = (file,) if file else (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME)
    return tuple(f"hub:{owner}/{name}/{file}" for file in names)


def from_open_clip(config: Mapping[str, Any], quick_gelu: bool, source: str) -> Settings:
    """Return the settings of an open_clip preprocessing config; absent keys have open_clip's defaults."""
    from open_clip.transform import PreprocessCfg

    default = PreprocessCfg()
    return Settings(
        mean=tuple(config.get("mean") or default.mean),
        std=tuple(config.get("std") or default.std),
        resize=config.get("resize_mode") or default.resize_mode,
        # As in open_clip, every value but "bilinear" means bicubic ("random" is for training).
        interpolation="bilinear" if config.get("interpolation") == "bilinear" else "bicubic",
        quick_gelu=quick_gelu,
        source=source,
    )


def _from_registry(model: str, tag: str) -> Settings:
    from open_clip.pretrained import get_pretrained_cfg

    published = get_pretrained_cfg(model, tag)
    return from_open_clip(published, bool(published.get("quick_gelu", False)), f"{model}, {tag}")


def _assumed(model: str) -> Settings:
    """Return the settings of unknown weights: the first published ones, with the activation of open_clip's config."""
    from open_clip import get_model_config

    quick_gelu = bool(get_model_config(model).get("quick_gelu", False))
    published = [_from_registry(model, tag) for tag in tags(model)]
    if not published:
        return replace(from_open_clip({}, quick_gelu, "open_clip's defaults"), recognized=False)
    preprocessing = {(one.mean, one.std, one.resize, one.interpolation) for one in published}
    activations = {one.quick_gelu for one in published} | {quick_gelu}
    assumed = [
        *(["pretrained"] if len(preprocessing) > 1 else []),
        *(["quick_gelu"] if len(activations) > 1 else []),
    ]
    return replace(published[0], quick_gelu=quick_gelu, recognized=False, assumed=tuple(assumed))


def _recognized(model: str, weights: str) -> tuple[str, str] | None:
    """Return the name and tag of published weights, by repository or by the name of a file on the web; or None."""
    repository = _repository(weights)
    if repository in _OTHER_COPIES:
        return _OTHER_COPIES[repository]
    file = PurePath(weights).name
    found = [
        (name, tag)
        for name, tag, published in _registry()
        if (repository and published["hf_hub"].startswith(f"{repository}/"))
        or (file and published["url"].endswith(f"/{file}") and _GENERIC_NAMES not in published["url"])
    ]
    # One file may be published for several models, such as ViT-B-32 and ViT-B-32-quickgelu, with the same settings.
    return next((known for known in found if known[0] == model), found[0] if found else None)


def _repository(weights: str) -> str:
    """Return the hub repository in a `weights` option; empty if there is none."""
    if weights.startswith("hub:"):
        owner, _, rest = weights.removeprefix("hub:").partition("/")
        return f"{owner}/{rest.partition('/')[0].partition('@')[0]}"
    for folder in reversed(PurePath(weights).parts[:-1]):
        if "--" in folder:
            return folder.removeprefix("models--").replace("--", "/", 1)
    return ""


def _registry() -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained

    for name, tag in list_pretrained():
        yield name, tag, get_pretrained_cfg(name, tag)


def _checked_tag(model: str, tag: str) -> str:
    known = tags(model)
    clean = tag.lower().replace("-", "_")  # as open_clip normalizes tags
    if clean not in known:
        hint = f"{did_you_mean(clean, known)} Its tags: {', '.join(known)}." if known else " It publishes none."
        raise ConfigError(f'options.pretrained: open_clip publishes no weights "{tag}" of {model}.{hint}')
    return clean
