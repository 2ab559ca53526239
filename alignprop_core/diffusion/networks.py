"""The networks of a base model, one by one: each has every weight from its file, or is refused; none stays random."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignprop_core.errors import ModelError

_log = getLogger(__name__)

_LIBRARIES = ("diffusers", "transformers")
_NAMED = 3
"""How many weights a message names; a part of another architecture has hundreds."""


def load_parts(folder: Path, index: Mapping[str, Any], given: Iterable[str] = ()) -> dict[str, nn.Module]:
    """Load the networks a diffusers folder lists, for `DiffusionPipeline.from_pretrained(folder, **parts)`.

    That function can load them too, but keeps what was missing to itself. What is no network (tokenizer, scheduler), or
    of no library we know, is left to it.

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
            # As diffusers does it: a part without a folder of its own may lie at the top.
            parts[part] = load_part(kind, folder / part if (folder / part).is_dir() else folder, part)
    return parts


def load_part(kind: Any, source: Path | str, part: str) -> nn.Module:
    """Load one network, on the CPU, in the dtype its library chooses; safetensors only.

    Args:
        kind: the network's class, of diffusers or transformers.
        source: the folder its files lie in, or a hub id.
        part: what the pipeline calls it; for messages.

    Raises:
        ModelError: the file lacks weights of this network, has them in another shape, or is damaged.
        OSError, ValueError: the library finds nothing there, or cannot read it.
    """
    from safetensors import SafetensorError

    try:
        with _no_load_report():
            # Other shapes are asked for too: left alone, the libraries name one of them, or none, and advise what
            # leaves weights random.
            network, info = kind.from_pretrained(
                source, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except SafetensorError as error:
        raise ModelError(f"{part} at {source} is damaged ({error}); download it again.") from error
    # A shard that lacks what its index promises is in no list of missing weights, but shows in the network.
    missing = set(info["missing_keys"]) | set(_never_filled(network))
    shapes = {name: (tuple(has), tuple(wants)) for name, has, wants in info["mismatched_keys"]}
    refuse_unfilled(network, part, source, missing, shapes)
    if info["unexpected_keys"]:
        unused = _some(sorted(info["unexpected_keys"]))
        _log.warning("%s at %s: weights that %s has no place for are left out: %s", part, source, kind.__name__, unused)
    assert isinstance(network, nn.Module)
    return network


def refuse_unfilled(
    network: nn.Module,
    part: str,
    where: Path | str,
    missing: Iterable[str] | None = None,
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
) -> None:
    """Refuse a network that did not get all of its weights from the file.

    Args:
        network: the network as its library loaded it.
        part: what the pipeline calls it.
        where: the folder, file or hub id it came from.
        missing: names of weights the file lacks; None looks for those still without storage, which is how diffusers
            leaves them.
        shapes: name -> (shape in the file, shape in the network), where they differ.

    Raises:
        ModelError: there are such weights; says which, and what to do.
    """
    shapes = shapes or {}
    # A weight left out for its shape is without storage as well.
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


@contextmanager
def _no_load_report() -> Iterator[None]:
    """Keep the libraries' own tables of missing and unused weights out; `load_part` says what they say."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    levels = [(module, module.get_verbosity()) for module in (diffusers_logging, transformers_logging)]
    for module, level in levels:
        module.set_verbosity(max(level, module.ERROR))
    try:
        yield
    finally:
        for module, level in levels:
            module.set_verbosity(level)
