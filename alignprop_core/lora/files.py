"""Complete LoRA files: all components and the header, written in both formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from alignprop_core.errors import LoraError
from alignprop_core.locate import DIFFUSERS_NAME
from alignprop_core.lora.formats import Factors, write_diffusers, write_kohya
from alignprop_core.lora.names import DENOISER

Parts = Mapping[str, Mapping[str, Factors]]
"""Component ("denoiser", "text_encoder", "text_encoder_2") -> module name -> factors."""

_ARCHITECTURES: dict[int | str, dict[str, str]] = {
    # A UNet by the width of the text embedding, a transformer by its class -> header entries that modelspec readers,
    # A1111 and Forge look for, with the values of kohya's scripts.
    768: {"modelspec.architecture": "stable-diffusion-v1/lora", "ss_base_model_version": "sd_v1"},
    1024: {"modelspec.architecture": "stable-diffusion-v2-768-v/lora", "ss_v2": "True"},
    2048: {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora", "ss_base_model_version": "sdxl_base_v1-0"},
    "SD3Transformer2DModel": {"modelspec.architecture": "stable-diffusion-3/lora", "ss_base_model_version": "sd3"},
    "FluxTransformer2DModel": {"modelspec.architecture": "flux-1/lora", "ss_base_model_version": "flux1"},
    "Flux2Transformer2DModel": {"modelspec.architecture": "flux-2/lora", "ss_base_model_version": "flux2"},
    "ZImageTransformer2DModel": {"modelspec.architecture": "z-image/lora", "ss_base_model_version": "zimage"},
}
FORMATS = ("diffusers", "kohya")


@dataclass(frozen=True)
class LoraFile:
    """The content of a LoRA file.

    Attributes:
        parts: component -> module name -> factors; always contains the denoiser.
        component: the denoiser's name in its pipeline, "unet" or "transformer".
        header: entries of the file's header: title, architecture, and all `alignprop.` entries.
    """

    parts: Parts
    component: str = "unet"
    header: Mapping[str, str] = field(default_factory=dict)

    @property
    def denoiser(self) -> Mapping[str, Factors]:
        """The denoiser's factors by module name."""
        return self.parts[DENOISER]


def architecture(width: object, kind: str) -> dict[str, str]:
    """Return the header entries for an architecture.

    Args:
        width: width of the text embeddings that a UNet reads; anything but a number if it is not known.
        kind: class of the denoiser, or its name in a pipeline; of use if the width is not that of a known UNet.
    """
    known = _ARCHITECTURES.get(width) if isinstance(width, int) else None
    return dict(known or _ARCHITECTURES.get(kind, {"modelspec.architecture": f"{kind}/lora"}))


def write_files(
    lora: LoraFile,
    folder: str | Path,
    name: str,
    *,
    formats: tuple[str, ...] = FORMATS,
    title: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Path]:
    """Write a LoRA into a folder, each file atomically; returns the files.

    Args:
        lora: the LoRA.
        folder: the folder; created if it does not exist.
        name: name of the file in kohya's layout, without suffix.
        formats: "diffusers" writes pytorch_lora_weights.safetensors, "kohya" writes NAME.safetensors.
        title: title in the headers; the name if None.
        dtype: dtype of the stored tensors.

    Raises:
        LoraError: the name is that of diffusers' file, or contains a folder.
        OutputError: the folder cannot be written to.
    """
    file = f"{name}.safetensors"
    if file.endswith(DIFFUSERS_NAME) or Path(file).name != file:
        raise LoraError(f'"{name}" cannot name a LoRA file; choose a plain name such as "my-style".')
    folder = Path(folder)
    networks = {lora.component if name == DENOISER else name: part for name, part in lora.parts.items()}
    header = {**architecture(_text_width(lora.denoiser), lora.component), **lora.header}
    header["modelspec.title"] = title or name
    writers = {"diffusers": (folder / DIFFUSERS_NAME, write_diffusers), "kohya": (folder / file, write_kohya)}
    for path, write in (writers[kind] for kind in formats):
        write(path, networks, metadata=header, dtype=dtype)
    return [writers[kind][0] for kind in formats]


def _text_width(factors: Mapping[str, Factors]) -> int | None:
    """Return the width of the text embeddings that a UNet reads; None if the LoRA does not change cross attention."""
    widths = {int(layer.down.shape[1]) for name, layer in factors.items() if name.endswith("attn2.to_k")}
    return widths.pop() if len(widths) == 1 else None
