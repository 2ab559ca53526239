"""A frozen CLIP model: pictures and prompts to unit vectors. Rewards here and in other plugins stand on it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alignprop_clip.architecture import Architecture
from alignprop_clip.checkpoint import to_open_clip
from alignprop_clip.preprocess import Preprocess
from alignprop_clip.tokens import Tokenizer
from alignprop_core.errors import WeightsError
from alignprop_core.weights import load_state_dict, read_header

Precision = Literal["float32", "bfloat16"]
_REMEMBERED = 8192  # prompts; 1024 numbers each are 32 MiB


class ClipEncoder(nn.Module):
    """A CLIP model with its preprocessing and tokenizer, frozen, in eval mode.

    Arithmetic runs in the parameters' type whatever autocast says outside, so that a score does not depend on where
    it is asked for; `precision="bfloat16"` switches autocast on inside.

    Attributes:
        network: open_clip's model, or its image tower alone (`images_only`).
        preprocess: what pictures go through.
        embed_dim: length of the embeddings.
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
        self.precision = precision
        self._tokenizer = None if images_only else Tokenizer(architecture.config["text_cfg"], architecture.name)
        self._tokens: dict[str, Tensor] = {}
        self._prompts: OrderedDict[str, Tensor] = OrderedDict()
        self.requires_grad_(False)
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters, in which the model computes."""
        return next(self.network.parameters()).dtype  # type: ignore[no-any-return]

    def images(self, images: Tensor) -> Tensor:
        """Embed pictures.

        Args:
            images: (B, 3, H, W) in [0, 1], any size, any floating-point type.

        Returns:
            (B, embed_dim) of length 1, float32 (float64 if the images are), with a gradient to the pixels.
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
        """Embed prompts; each is computed once and remembered.

        One prompt is one forward pass: in a larger batch the last bits would depend on which prompts are new, and a
        resumed run, with nothing remembered, would not be the run.

        Returns:
            (B, embed_dim) of length 1, in the parameters' type (at least float32), without a gradient.
        """
        device = next(self.network.parameters()).device
        return torch.stack([self._prompt(prompt, device) for prompt in prompts])

    @property
    def logit_scale(self) -> Tensor:
        """exp of the learned logit scale, a scalar: what cosines were multiplied with in training."""
        scale: Tensor = self.network.logit_scale.detach().exp()
        return scale.reshape(())

    @property
    def logit_bias(self) -> Tensor | None:
        """The learned logit bias, a scalar, of models trained with the sigmoid loss; None for others."""
        bias: Tensor | None = self.network.logit_bias
        return None if bias is None else bias.detach().reshape(())

    def _prompt(self, prompt: str, device: torch.device) -> Tensor:
        if prompt in self._prompts:
            self._prompts.move_to_end(prompt)
            return self._prompts[prompt]
        if self._tokenizer is None:
            raise RuntimeError("this encoder was loaded for pictures only")
        # inference_mode(False): a tensor made in inference mode could not take part in a later backward pass.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"),
        ):
            features = self.network.encode_text(self._tokenizer(prompt).to(device))[0]
        wide = torch.promote_types(features.dtype, torch.float32)
        with torch.inference_mode(False), torch.no_grad():
            self._prompts[prompt] = F.normalize(features.to(wide), dim=-1)
        if len(self._prompts) > _REMEMBERED:
            self._prompts.popitem(last=False)
        return self._prompts[prompt]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ClipEncoder:
        """Forget the prompts when the model moves to another device or type."""
        self._prompts.clear()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]


def load_clip(
    path: Path,
    architecture: Architecture,
    *,
    images_only: bool = False,
    precision: Precision = "float32",
    quick_gelu: bool | None = None,
) -> ClipEncoder:
    """Load a CLIP model from a file.

    Args:
        path: the weights, in any format `to_open_clip` takes; the model is built in float32.
        architecture: what the file holds, if it does not say so itself (metadata key "config").
        images_only: leave the text tower out; the file need not have one.
        precision: see `ClipEncoder`.
        quick_gelu: the activation that was asked for; a file that says it has the other is refused.

    Raises:
        WeightsError: the file cannot be read, or holds another model.
        ConfigError: the architecture cannot be built.
    """
    header = read_header(path)
    name = architecture.name
    if header:
        architecture, name = Architecture.from_header(header, str(path)), "the one in its header"
        if quick_gelu not in (None, said := architecture.config.get("quick_gelu", False)):
            raise WeightsError(
                f"{path} says in its header that its model has quick_gelu: {str(said).lower()}; leave the option "
                "quick_gelu out."
            )
    vocabulary = int(architecture.config["text_cfg"].get("vocab_size", 49408))
    state = to_open_clip(load_state_dict(path), str(path), vocabulary=vocabulary)
    if state.get("logit_bias") is not None and "init_logit_bias" not in architecture.config:
        architecture = Architecture(
            architecture.name, {**architecture.config, "init_logit_bias": 0.0}, architecture.preprocess
        )
    network = architecture.empty()
    fill(network, state, str(path), name, prefix="visual." if images_only else "")
    return ClipEncoder(network, architecture, images_only=images_only, precision=precision)


def fill(network: nn.Module, state: Mapping[str, Tensor], where: str, name: str, *, prefix: str = "") -> None:
    """Put a state dict into an empty model, as float32. Every key must be there, with the right shape, and no other.

    Args:
        network: an open_clip model with parameters on the meta device.
        state: in open_clip's keys; the text tower's with or without "text." before them.
        where: the file, for messages.
        name: the model, for messages.
        prefix: only keys that begin so are wanted.

    Raises:
        WeightsError: the weights are those of another model.
    """
    from open_clip.model import convert_to_custom_text_state_dict

    wanted = {k: v for k, v in network.state_dict().items() if k.startswith(prefix)}
    if "positional_embedding" in state and "positional_embedding" not in wanted:
        state = convert_to_custom_text_state_dict(dict(state))
    elif "text.positional_embedding" in state and "positional_embedding" in wanted:
        state = {key.removeprefix("text."): value for key, value in state.items()}
    given = {k: v for k, v in state.items() if k.startswith(prefix)}
    for key in ("logit_scale", "logit_bias"):  # scalars in some files, (1,) in others
        if key in given and key in wanted and given[key].numel() == wanted[key].numel():
            given[key] = given[key].reshape(wanted[key].shape)
    problems = [
        *(f"it lacks {key}" for key in sorted(wanted.keys() - given.keys())),
        *(f"it has {key}, which the model does not" for key in sorted(given.keys() - wanted.keys())),
        *(
            f"{key} has shape {tuple(given[key].shape)}, the model's {tuple(wanted[key].shape)}"
            for key in sorted(wanted.keys() & given.keys())
            if given[key].shape != wanted[key].shape
        ),
        *(
            f"{key} holds {str(given[key].dtype).removeprefix('torch.')} where the model has floating-point numbers"
            for key in sorted(wanted.keys() & given.keys())
            if wanted[key].is_floating_point() and not given[key].is_floating_point()
        ),
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise WeightsError(
            f"{where} holds another model than {name}: {'; '.join(problems[:3])}{more}.{_likely(state)} Choose the "
            "weights that belong to the model."
        )
    floats = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
    network.load_state_dict(floats, strict=False, assign=True)


def _likely(state: Mapping[str, Tensor]) -> str:
    """Return a sentence that names the open_clip models a state dict would fit, as far as three shapes tell."""
    import open_clip

    conv, positions = state.get("visual.conv1.weight"), state.get("visual.positional_embedding")
    text = state.get("ln_final.weight", state.get("text.ln_final.weight"))
    if conv is None or positions is None or conv.ndim != 4:
        return ""
    fits = []
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
            fits.append(name)
    return f" It looks like {' or '.join(fits[:3])}." if fits else ""
