"""A LoRA file as a whole: all its parts and what its header says, read from one format and written in both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open

from alignprop_core.errors import LoraError
from alignprop_core.locate import DIFFUSERS_NAME, find_lora
from alignprop_core.lora.formats import (
    DENOISER,
    Factors,
    read_lora,
    write_diffusers,
    write_kohya,
)

Parts = Mapping[str, Mapping[str, Factors]]
"""Component ("denoiser", "text_encoder", "text_encoder_2") -> module name -> factors."""

_ARCHITECTURES = {  # by width of the text embedding: what modelspec readers and A1111 call it
    768: {"modelspec.architecture": "stable-diffusion-v1/lora", "ss_base_model_version": "sd_v1"},
    1024: {"modelspec.architecture": "stable-diffusion-v2-768-v/lora", "ss_v2": "True"},
    2048: {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora", "ss_base_model_version": "sdxl_base_v1-0"},
}
_KEPT = ("modelspec.architecture", "modelspec.title", "ss_base_model_version", "ss_v2")


@dataclass(frozen=True)
class WholeLora:
    """What a LoRA file holds.

    Attributes:
        parts: component -> module name -> factors; the denoiser's is always there.
        component: the denoiser's name in its pipeline, "unet" or "transformer".
        header: what readers of the file show or go by: title, architecture, and all `alignprop.` entries.
    """

    parts: Parts
    component: str = "unet"
    header: Mapping[str, str] = field(default_factory=dict)

    @property
    def denoiser(self) -> Mapping[str, Factors]:
        """The denoiser's part."""
        return self.parts[DENOISER]

    @property
    def rank(self) -> int:
        """The highest rank of any layer."""
        return max(layer.rank for part in self.parts.values() for layer in part.values())


def architecture(width: int | None, otherwise: str) -> dict[str, str]:
    """Return the header entries for a denoiser whose text embeddings are this wide; `otherwise` names unknown ones."""
    other = {"modelspec.architecture": f"{otherwise}/lora"}
    return dict(_ARCHITECTURES.get(width, other) if width is not None else other)


def read_whole(path: str | Path) -> WholeLora:
    """Read a LoRA of either format.

    Args:
        path: a file, a LoRA folder or a run folder.

    Raises:
        LoraError: as `read_lora`; or the file changes a text encoder alone.
    """
    file = find_lora(path)
    parts = read_lora(file)
    if DENOISER not in parts:
        raise LoraError(f"{file} changes no denoiser, only {', '.join(sorted(parts))}; such files are not handled.")
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata() or {}
        first = next(key for key in opened.keys() if not key.startswith(("text_encoder", "lora_te")))  # noqa: SIM118
    component = "transformer" if first.startswith(("transformer.", "lora_transformer_")) else "unet"
    kept = {key: value for key, value in header.items() if key in _KEPT or key.startswith("alignprop.")}
    return WholeLora(parts, component, kept)


def write_whole(
    lora: WholeLora, folder: str | Path, name: str, *, formats: tuple[str, ...] = ("diffusers", "kohya")
) -> list[Path]:
    """Write a LoRA into a folder: diffusers' format, and NAME.safetensors in kohya's layout; returns the files.

    Raises:
        LoraError: the name is that of diffusers' own file, or is no plain file name.
        OutputError: the folder cannot be written to.
    """
    file = f"{name}.safetensors"
    if file.endswith(DIFFUSERS_NAME) or Path(file).name != file:
        raise LoraError(f'"{name}" cannot name a LoRA file; choose a plain name such as "my-style".')
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    encoders = {component: part for component, part in lora.parts.items() if component != DENOISER}
    header = {**lora.header, "modelspec.title": name}
    written = []
    if "diffusers" in formats:
        written.append(folder / DIFFUSERS_NAME)
        write_diffusers(written[-1], lora.denoiser, component=lora.component, text_encoders=encoders, metadata=header)
    if "kohya" in formats:
        written.append(folder / file)
        header = architecture(_text_width(lora.denoiser), lora.component) | header
        write_kohya(written[-1], lora.denoiser, component=lora.component, text_encoders=encoders, metadata=header)
    return written


def _text_width(factors: Mapping[str, Factors]) -> int | None:
    """Return the width of the text embeddings a UNet's cross attention reads, where the LoRA changes that."""
    widths = {int(layer.down.shape[1]) for name, layer in factors.items() if name.endswith("attn2.to_k")}
    return widths.pop() if len(widths) == 1 else None
