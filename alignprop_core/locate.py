"""From what a config or an option says to the folder or file of a base model or LoRA. No torch, no network."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from alignprop_core.errors import LoraError, ModelError, did_you_mean

if TYPE_CHECKING:
    from alignprop_core.registry.registry import Registry

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
"""The file name plain `pipe.load_lora_weights(folder)` looks for."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def find_base(base: str, registry: Registry) -> Path | str:
    """Return the folder, file or hub id that a base model's name means.

    Raises:
        ModelError: there is nothing of this name, or it is no model; a hub id is not looked for.
    """
    offer = registry.find_model(base)
    if offer is not None:
        path = offer.spec.path
        if ":" not in path:
            return path
        module, _, function = path.partition(":")
        folder = Path(getattr(import_module(module), function)())
        if not folder.is_dir():
            raise ModelError(f'Model "{base}" of {offer.distribution} should be at {folder}, which does not exist.')
        return folder
    path_ = Path(base).expanduser()
    if path_.is_dir():
        if not (path_ / "model_index.json").is_file():
            raise ModelError(f"{path_} is no diffusers folder: it has no model_index.json.")
        return path_
    if path_.suffix in _PICKLES:
        raise ModelError(
            f"{path_} is a pickle, which can run code when opened; convert it to .safetensors and give that."
        )
    if path_.is_file():
        return path_
    if path_.suffix == ".safetensors" or base.startswith((".", "/", "~")):
        raise ModelError(f"{path_} does not exist.")
    if _HUB_ID.fullmatch(base):
        return base
    known = [offer.spec.name for offer in registry.models()]
    raise ModelError(
        f'Unknown model "{base}": it is no registered model ({", ".join(known) or "none installed"}), no folder, '
        f'no file and no hub id of the form "owner/name".{did_you_mean(base, known)}'
    )


def find_vae(vae: str) -> Path | str:
    """Return the folder or hub id that an autoencoder's name means; `ModelError` if it is a path to nothing."""
    path = Path(vae).expanduser()
    if path.is_dir():
        return path
    if vae.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(vae):
        raise ModelError(f"{path} is no folder; an autoencoder is a diffusers folder or a hub id.")
    return vae


def find_lora(path: str | Path) -> Path:
    """Return the LoRA file that `path` means: itself, or the one inside a LoRA folder or a run folder.

    Raises:
        LoraError: nothing there, several candidates, or a pickled file.
    """
    path = Path(path)
    if path.is_dir():
        folder = path / "lora" if (path / "lora").is_dir() else path
        found = sorted(folder.glob("*.safetensors"))
        preferred = [file for file in found if file.name == DIFFUSERS_NAME] or found
        if len(preferred) == 1:
            return preferred[0]
        if found:
            raise LoraError(
                f"{folder} holds several LoRA files ({', '.join(f.name for f in found)}): name one of them."
            )
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix in _PICKLES)
        if not pickles:
            raise LoraError(f"{folder} holds no LoRA: a .safetensors file is expected there.")
        path = folder / pickles[0]
    if path.suffix in _PICKLES:
        raise LoraError(
            f"{path} is a pickled file, and opening one can run any code hidden in it; alignprop never does. "
            "Convert it to .safetensors with a tool of your trust, then name that file."
        )
    if not path.is_file():
        raise LoraError(f"{path}: there is no such LoRA file or folder.")
    return path
