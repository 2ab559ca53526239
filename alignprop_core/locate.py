"""Finding base models and LoRA files on this machine. Imports no torch, uses no network."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from alignprop_core.errors import LoraError, ModelError, did_you_mean

if TYPE_CHECKING:
    from alignprop_core.registry.registry import Registry

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
"""The file name that `pipe.load_lora_weights(folder)` looks for."""

PARTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Networks of a model that can come from elsewhere: keys of the `model` section."""

PASSED = "pipeline:"
"""How the name of a base model starts that was passed from Python, a loaded pipeline, and has no name of its own."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PICKLE = "a pickle, which can run code when opened, so it is refused: convert it to .safetensors"
_FORMATS = {
    b"PK\x03\x04": _PICKLE,  # torch's zip format
    b"\x80": _PICKLE,  # protocol 2 and later, as torch wrote before
    b"version https://git-lfs": "a Git LFS pointer, not the file itself (fetch it: git lfs pull)",
    b"GGUF": "a quantized GGUF file",
    b"<": "a web page, not a model: download it again",
}
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def find_base(base: str, registry: Registry) -> Path | str:
    """Return the folder, file or hub id that a base model's name means.

    Raises:
        ModelError: nothing has this name, or it is not a model; hub ids are not checked.
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
    if base.startswith(PASSED):
        raise ModelError(
            f"the base model was a {base.removeprefix(PASSED)} passed from Python, without a name to load it by. Pass "
            "it again: alignprop_core.Run(folder, model=pipeline). For a command, write what the pipeline was loaded "
            "from (a folder, a file or a hub id) into the run's config.yaml, as model.base."
        )
    path_ = Path(base).expanduser()
    if path_.is_dir():
        if not (path_ / "model_index.json").is_file():
            raise ModelError(f"{path_} is not a diffusers folder: it has no model_index.json.")
        return path_
    if path_.is_file():
        if (content := file_format(path_)) == "safetensors":
            return path_
        raise ModelError(f"{path_} is {content}; model.base takes a diffusers folder, a safetensors file or a hub id.")
    if path_.suffix.lower() in {".safetensors", *_PICKLES} or base.startswith((".", "/", "~")):
        raise ModelError(f"{path_} does not exist.")
    if _HUB_ID.fullmatch(base):
        return base
    known = [offer.spec.name for offer in registry.models()]
    raise ModelError(
        f'Unknown model "{base}": it is not a registered model ({", ".join(known) or "none installed"}), a '
        f'folder, a file or a hub id of the form "owner/name".{did_you_mean(base, known)}'
    )


def find_part(part: str, name: str) -> Path | str:
    """Return the file that the name of a part of a model means; for an autoencoder also the folder or hub id.

    Raises:
        ModelError: there is no such file or folder, or it is not a safetensors file; hub ids are not checked.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if (content := file_format(path)) == "safetensors":
            return path
        raise ModelError(f"{path} is {content}; this key takes a safetensors file.")
    if part != "vae":
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ModelError(f"{path} {what}; model.{part} is one .safetensors file.")
    if path.is_dir():
        if not any((folder / "config.json").is_file() for folder in (path, path / "vae")):
            raise ModelError(f"{path} is not an autoencoder's folder: it has no config.json.")
        return path
    if name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name):
        raise ModelError(f"{path} is not a folder; an autoencoder is a diffusers folder, a hub id or a file.")
    return name


def file_format(path: Path) -> str:
    """Return "safetensors", or in words what else a file is: by its content, whatever its name is."""
    with open(path, "rb") as stream:
        start = stream.read(30)
    # Checked first: the eight bytes before it are the header's length and may look like another format.
    if start[8:9] == b"{":
        return "safetensors"
    other = "a file of an unknown format" if start else "an empty file: download it again"
    other = _PICKLE if path.suffix.lower() in _PICKLES else other  # of a protocol without a mark
    return next((name for prefix, name in _FORMATS.items() if start.startswith(prefix)), other)


def find_lora(path: str | Path) -> Path:
    """Return the LoRA file that `path` means: itself, or the one inside a LoRA folder or a run folder.

    Raises:
        LoraError: no file, several candidates, or a pickled file.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        folder = path / "lora" if (path / "lora").is_dir() else path
        found = sorted(folder.glob("*.safetensors"))
        preferred = [file for file in found if file.name == DIFFUSERS_NAME] or found
        if len(preferred) == 1:
            return preferred[0]
        if found:
            raise LoraError(
                f"{folder} contains several LoRA files ({', '.join(f.name for f in found)}): name one of them."
            )
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix.lower() in _PICKLES)
        if not pickles:
            raise LoraError(f"{folder} contains no LoRA: a .safetensors file is expected.")
        path = folder / pickles[0]
    if path.suffix.lower() in _PICKLES if not path.is_file() else file_format(path) == _PICKLE:
        raise LoraError(
            f"{path} is a pickled file, which can run arbitrary code when opened, so it is refused. "
            "Convert it to .safetensors with a tool that you trust, then name that file."
        )
    if not path.is_file():
        raise LoraError(f"{path}: there is no such LoRA file or folder.")
    return path
