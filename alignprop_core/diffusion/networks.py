"""Loading the networks of a base model: a network whose file lacks weights is refused, so none stays random."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignprop_core.errors import ModelError, complaint

_log = getLogger(__name__)

_LIBRARIES = ("diffusers", "transformers")
_VARIANT = r"[^.]+\.(\w+)(?:-\d+-of-\d+)?\.safetensors"
"""Names of weights of a variant, complete or of one shard: model.fp16.safetensors, model.fp16-00001-of-00002..."""
_NAMED = 3
"""How many weights a message names; a part of another architecture has hundreds."""


def load_parts(folder: Path, index: Mapping[str, Any], given: Iterable[str] = ()) -> dict[str, nn.Module]:
    """Load the networks a diffusers folder lists, for `DiffusionPipeline.from_pretrained(folder, **parts)`.

    That function can load them too, but does not report missing weights. It loads what is not a network (tokenizer,
    scheduler) or not from diffusers or transformers.

    Args:
        folder: the diffusers folder.
        index: its model_index.json: part -> (library, class), among other keys.
        given: parts that come from elsewhere, or not at all.

    Raises:
        ModelError: as `load_part`.
    """
    parts = {}
    for part, entry in index.items():
        if part in given or not isinstance(entry, (list, tuple)) or len(entry) != 2 or entry[0] not in _LIBRARIES:
            continue
        kind = getattr(import_module(entry[0]), str(entry[1]), None)
        if isinstance(kind, type) and issubclass(kind, nn.Module) and hasattr(kind, "from_pretrained"):
            # As in diffusers: files of a part without its own folder can be in the top folder.
            parts[part] = load_part(kind, folder / part if (folder / part).is_dir() else folder, part)
    return parts


def _variant(folder: Path) -> str | None:
    """Return the variant of a part's weights, such as "fp16", if the folder has them in no other."""
    files = [file.name for file in folder.glob("*.safetensors*")]
    if any(re.fullmatch(r"[^.]+(-\d+-of-\d+)?\.safetensors", name) for name in files):
        return None
    found = sorted({match[1] for name in files if (match := re.fullmatch(_VARIANT, name))})
    return "fp16" if "fp16" in found else found[0] if len(found) == 1 else None


def load_part(kind: Any, source: Path | str, part: str) -> nn.Module:
    """Load one network, on the CPU, in the dtype its library chooses; safetensors only.

    Args:
        kind: the network's class, of diffusers or transformers.
        source: the folder that contains its files, or a hub id.
        part: its name in the pipeline, for messages.

    Raises:
        ModelError: the library finds no file or cannot read it, or it lacks weights of this network or has them in
            another shape.
    """
    from safetensors import SafetensorError

    variant = _variant(Path(source))
    try:
        # Weights of other shapes are skipped and reported below with the missing ones. Without this option the
        # libraries raise errors that name one of them or none, and advise an option that leaves weights random.
        network, info = kind.from_pretrained(
            source, variant=variant, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except SafetensorError as error:
        raise ModelError(f"{part} at {source} is damaged ({error}); download it again.") from error
    except Exception as error:  # the libraries raise many types for an invalid value
        raise ModelError(f"{part} at {source} could not be loaded: {complaint(error)}. Download it again.") from error
    # Weights that the index lists but the shard lacks are not in `missing_keys`; they are still on the meta device.
    missing = set(info["missing_keys"]) | set(_never_filled(network))
    shapes = {name: (tuple(has), tuple(wants)) for name, has, wants in info["mismatched_keys"]}
    refuse_unfilled(network, part, source, missing, shapes)
    if info["unexpected_keys"]:
        unused = _some(sorted(info["unexpected_keys"]))
        _log.warning("%s at %s: ignored weights that %s does not have: %s", part, source, kind.__name__, unused)
    assert isinstance(network, nn.Module)
    return network


def refuse_unfilled(
    network: nn.Module,
    part: str,
    where: Path | str,
    missing: Iterable[str] | None = None,
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
) -> None:
    """Raise an error if a network did not get all of its weights from the file.

    Args:
        network: the network as its library loaded it.
        part: its name in the pipeline.
        where: the folder, file or hub id it came from.
        missing: names of weights the file lacks; None means those still on the meta device, where diffusers leaves
            them.
        shapes: name -> (shape in the file, shape in the network), where they differ.

    Raises:
        ModelError: weights are missing or have other shapes; names them.
    """
    shapes = shapes or {}
    # A weight skipped for its shape is on the meta device as well.
    lacking = sorted(set(_never_filled(network) if missing is None else missing) - set(shapes))
    if not lacking and not shapes:
        return
    kind, total = type(network).__name__, len(network.state_dict())
    wrong = []
    if lacking:
        wrong.append(f"{len(lacking)} of the {total} weights of {kind} missing ({_some(lacking)})")
    if shapes:
        different = [f"{name} is {has}, not {wants}" for name, (has, wants) in sorted(shapes.items())]
        wrong.append(f"{len(shapes)} of the {total} weights of {kind} of another shape ({_some(different)})")
    library = type(network).__module__.partition(".")[0]
    version = getattr(import_module(library), "__version__", "of unknown version")
    raise ModelError(
        f"{part} at {where} does not fit: {'; '.join(wrong)}. Such weights would stay random, so the model is not "
        "used. Either its files are damaged or belong to another model: download it again. Or they were written for "
        f"another version of {library} than the installed {version}: install one that reads them."
    )


def _never_filled(network: nn.Module) -> list[str]:
    return [
        name
        for name, value in network.state_dict(keep_vars=True).items()
        if isinstance(value, torch.Tensor) and value.is_meta
    ]


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
