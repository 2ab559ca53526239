"""Frozen CLIP encoder: images and prompts to unit-length embeddings. Shared by the CLIP rewards of all plugins."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alignprop_clip.architecture import Architecture
from alignprop_clip.checkpoint import to_open_clip
from alignprop_clip.config import Precision
from alignprop_clip.preprocess import Preprocess
from alignprop_clip.published import tags
from alignprop_clip.tokenizer import Tokenizer
from alignprop_core.errors import WeightsError
from alignprop_core.weights import load_state_dict, read_header

_PROMPT_CACHE_SIZE = 8192  # prompts; 32 MiB at 1024 float32 values each


class ClipEncoder(nn.Module):
    """A CLIP model with its preprocessing and tokenizer, frozen, in eval mode.

    The model computes in the dtype of its parameters even inside an outer autocast region, so that a score does not
    depend on its caller. `precision="bfloat16"` enables autocast inside the model.

    Args:
        network: open_clip's model, with its weights.
        architecture: the model config and preprocessing.
        images_only: keep the image tower only.
        precision: "float32", or "bfloat16" for autocast.

    Attributes:
        activation: "QuickGELU", or "GELU" (of the text tower at least; timm's image towers have their own).
        network: open_clip's model, or its image tower only (`images_only`).
        preprocess: image preprocessing; may be replaced.
        embed_dim: length D of the embeddings.
    """

    def __init__(
        self,
        network: nn.Module,
        architecture: Architecture,
        *,
        images_only: bool = False,
        precision: Precision = "float32",
    ) -> None:
        super().__init__()
        self.network: Any = network.visual if images_only else network
        self.images_only = images_only
        self.preprocess: Preprocess = architecture.preprocess
        self.embed_dim = int(architecture.config["embed_dim"])
        self.activation = "QuickGELU" if architecture.config.get("quick_gelu") else "GELU"
        self.precision = precision
        self._tokenizer = None if images_only else Tokenizer(architecture.config["text_cfg"], architecture.name)
        self._prompt_cache: OrderedDict[str, Tensor] = OrderedDict()
        self.requires_grad_(False)
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the parameters, in which the model computes."""
        return next(self.network.parameters()).dtype  # type: ignore[no-any-return]

    def images(self, images: Tensor) -> Tensor:
        """Embed images, differentiably with respect to their pixels.

        Args:
            images: (B, 3, H, W) in [0, 1], any size, any floating-point dtype.

        Returns:
            (B, embed_dim) unit vectors, float32; float64 if the images are.
        """
        pixels = self.preprocess(images)
        with torch.autocast(pixels.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
            features = (
                self.network(pixels.to(self.dtype))
                if self.images_only
                else self.network.encode_image(pixels.to(self.dtype))
            )
        return F.normalize(features.to(pixels.dtype), dim=-1)

    def prompts(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts, without a gradient; the embeddings are cached.

        Each prompt is one forward pass. In a larger batch the last bits would depend on which prompts are cached, so a
        resumed run, which starts with an empty cache, would differ from the uninterrupted run.

        Args:
            prompts: B strings.

        Returns:
            (B, embed_dim) unit vectors in the dtype of the parameters, at least float32.
        """
        device = next(self.network.parameters()).device
        return torch.stack([self._embed_prompt(prompt, device) for prompt in prompts])

    @property
    def logit_scale(self) -> Tensor:
        """exp of the learned logit scale, a scalar: the factor of the cosine similarity in the training loss."""
        scale: Tensor = self.network.logit_scale.detach().exp()
        return scale.reshape(())

    @property
    def logit_bias(self) -> Tensor | None:
        """The learned logit bias, a scalar, of a model trained with the sigmoid loss; None for other models."""
        bias: Tensor | None = self.network.logit_bias
        return None if bias is None else bias.detach().reshape(())

    def _embed_prompt(self, prompt: str, device: torch.device) -> Tensor:
        """Return the (embed_dim,) embedding of a prompt from the cache, or compute and cache it."""
        if prompt in self._prompt_cache:
            self._prompt_cache.move_to_end(prompt)
            return self._prompt_cache[prompt]
        if self._tokenizer is None:
            raise RuntimeError("this encoder has no text tower: it was loaded with images_only=True")
        # inference_mode(False): autograd cannot use tensors created in inference mode in a later backward pass.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"),
        ):
            features = self.network.encode_text(self._tokenizer(prompt).to(device))[0]
        wide = torch.promote_types(features.dtype, torch.float32)
        with torch.inference_mode(False), torch.no_grad():
            self._prompt_cache[prompt] = F.normalize(features.to(wide), dim=-1)
        if len(self._prompt_cache) > _PROMPT_CACHE_SIZE:
            self._prompt_cache.popitem(last=False)
        return self._prompt_cache[prompt]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ClipEncoder:
        """Clear the prompt cache when the model moves to another device or dtype."""
        self._prompt_cache.clear()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]


def load_clip(
    path: Path,
    architecture: Architecture,
    *,
    images_only: bool = False,
    precision: Precision = "float32",
    quick_gelu: bool | None = None,
) -> ClipEncoder:
    """Load a CLIP model from a file, in float32.

    Args:
        path: the weights, in any format that `to_open_clip` accepts.
        architecture: the model in the file; ignored if the header of the file stores one (metadata key "config").
        images_only: load the image tower only; the file need not contain a text tower.
        precision: see `ClipEncoder`.
        quick_gelu: the activation set in the options, or None; a file whose header stores the other one is refused.

    Raises:
        WeightsError: the file cannot be read, or contains another model.
        ConfigError: the architecture cannot be built.
    """
    header = read_header(path)
    name = architecture.name
    if header:
        architecture, name = Architecture.from_header(header, str(path)), "the one in its header"
        if quick_gelu not in (None, stored := architecture.config.get("quick_gelu", False)):
            raise WeightsError(
                f"{path}: its header sets quick_gelu: {str(stored).lower()}, the options set the opposite. Remove the "
                "option quick_gelu."
            )
    vocabulary = int(architecture.config["text_cfg"].get("vocab_size", 49408))
    state = to_open_clip(load_state_dict(path), str(path), vocabulary=vocabulary)
    if state.get("logit_bias") is not None and "init_logit_bias" not in architecture.config:
        architecture = replace(architecture, config={**architecture.config, "init_logit_bias": 0.0})
    network = architecture.build_empty()
    _load_strictly(network, state, str(path), name, prefix="visual." if images_only else "")
    _warn_of_assumed(architecture, path)
    return ClipEncoder(network, architecture, images_only=images_only, precision=precision)


def _warn_of_assumed(architecture: Architecture, path: Path) -> None:
    """Show a warning if published weights of this model differ in settings, and the file is none of them by name."""
    settings = architecture.settings
    if settings is None or not settings.assumed:
        return
    preprocess = "preprocessing" if "pretrained" in settings.assumed else ""
    activation = "activation (QuickGELU or GELU)" if "quick_gelu" in settings.assumed else ""
    warnings.warn(
        f"{path}: open_clip publishes weights of {architecture.name} that differ in "
        f"{' and '.join(filter(None, (preprocess, activation)))}, and this file is not one of them by its folder or "
        f"name. It is used with mean {settings.mean}, std {settings.std} and quick_gelu: "
        f"{str(settings.quick_gelu).lower()}. Set the option pretrained to the weights that it was trained from "
        f"({', '.join(tags(architecture.name))}){', or set quick_gelu' if activation and not preprocess else ''}.",
        stacklevel=3,
    )


def _load_strictly(network: nn.Module, state: Mapping[str, Tensor], where: str, name: str, *, prefix: str = "") -> None:
    """Assign a state dict to an empty model, as float32; keys and shapes must match exactly.

    Args:
        network: an open_clip model with parameters on the meta device.
        state: tensors under open_clip's keys; text tower keys with or without the prefix "text.".
        where: the file, for messages.
        name: the model, for messages.
        prefix: load only keys with this prefix.

    Raises:
        WeightsError: the weights belong to another model; the message names up to three keys and the likely model.
    """
    from open_clip.model import convert_to_custom_text_state_dict

    expected = {k: v for k, v in network.state_dict().items() if k.startswith(prefix)}
    if "positional_embedding" in state and "positional_embedding" not in expected:
        state = convert_to_custom_text_state_dict(dict(state))
    elif "text.positional_embedding" in state and "positional_embedding" in expected:
        state = {key.removeprefix("text."): value for key, value in state.items()}
    given = {k: v for k, v in state.items() if k.startswith(prefix)}
    for key in ("logit_scale", "logit_bias"):  # shape () in some files, (1,) in others
        if key in given and key in expected and given[key].numel() == expected[key].numel():
            given[key] = given[key].reshape(expected[key].shape)
    problems = [
        *(f"{key} is missing" for key in sorted(expected.keys() - given.keys())),
        *(f"{key} is not in the model" for key in sorted(given.keys() - expected.keys())),
        *(
            f"{key} has shape {tuple(given[key].shape)}, expected {tuple(expected[key].shape)}"
            for key in sorted(expected.keys() & given.keys())
            if given[key].shape != expected[key].shape
        ),
        *(
            f"{key} has dtype {str(given[key].dtype).removeprefix('torch.')}, expected a floating-point dtype"
            for key in sorted(expected.keys() & given.keys())
            if expected[key].is_floating_point() and not given[key].is_floating_point()
        ),
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise WeightsError(
            f"{where} contains another model than {name}: {'; '.join(problems[:3])}{more}.{_likely_models(state)} "
            "Choose weights and model that belong together."
        )
    floats = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
    network.load_state_dict(floats, strict=False, assign=True)


def _likely_models(state: Mapping[str, Tensor]) -> str:
    """Return a sentence with the open_clip models that a state dict may belong to, judged by three shapes; or ""."""
    import open_clip

    conv, positions = state.get("visual.conv1.weight"), state.get("visual.positional_embedding")
    text = state.get("ln_final.weight", state.get("text.ln_final.weight"))
    if conv is None or positions is None or conv.ndim != 4 or 0 in (positions.ndim, 1 if text is None else text.ndim):
        return ""
    matches = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision = config["vision_cfg"]
        if (
            isinstance(vision.get("layers"), list)
            or "timm_model_name" in vision
            or "quickgelu" in name
            or "coca" in name
        ):
            continue
        size, patch = vision.get("image_size", 224), vision.get("patch_size")
        if not isinstance(size, int) or not patch or "hf_model_name" in config["text_cfg"]:
            continue
        shapes = (vision.get("width"), patch, (size // patch) ** 2 + 1)
        text_fits = text is None or text.shape[0] == config["text_cfg"].get("width")
        if shapes == (conv.shape[0], conv.shape[-1], positions.shape[0]) and text_fits:
            matches.append(name)
    return f" It looks like {' or '.join(matches[:3])}." if matches else ""
