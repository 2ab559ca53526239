"""The files that a run depends on, with their checksums: recorded in environment.json, compared when resuming."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from alignprop_core._files import unused_name
from alignprop_core.config.sections import RunConfig
from alignprop_core.locate import find_base, find_lora, find_part
from alignprop_core.prompts import PromptSet
from alignprop_core.registry.local import split_file_name
from alignprop_core.registry.registry import Registry
from alignprop_core.weights.checksum import checksum

_SUFFIXES = {".json", ".jsonl", ".txt", ".model", ".safetensors"}
"""What a diffusers folder is loaded from; hub folders also contain the same weights in other formats."""

Files = dict[str, dict[str, str]]
"""Key of the run config -> name of a file -> SHA-256."""


def files_of(
    config: RunConfig,
    registry: Registry,
    prompts: PromptSet,
    heldout: PromptSet | None,
    *,
    model: bool,
    read: Mapping[str, Iterable[Path]] | None = None,
) -> Files:
    """Return the checksums of a run's prompts, base model, VAE, LoRAs, and its rewards' files.

    Args:
        config: the run config.
        registry: where registered models are looked up.
        prompts: the training prompts.
        heldout: the held-out prompts.
        model: whether the model is loaded from the config instead of passed from Python.
        read: label of a reward -> the files that it was loaded from, once that is known.
    """
    found = {"prompts.train": {prompts.name: prompts.checksum}}
    if heldout is not None:
        found["prompts.heldout"] = {heldout.name: heldout.checksum}
    if model:
        found["model.base"] = _of_model(find_base(config.model.base, registry))
        found |= {f"model.{part}": _of_model(find_part(part, path)) for part, path in config.model.parts.items()}
        found |= {f"model.loras.{i}": _checksums([find_lora(lora.path)]) for i, lora in enumerate(config.model.loras)}
    if config.lora.init_from is not None:
        found["lora.init_from"] = _checksums([find_lora(config.lora.init_from)])
    for i, entry in enumerate(config.rewards):
        if (code := split_file_name(entry.name)) is not None:
            found[f"rewards.{i}.name"] = _checksums([Path(code[0]).expanduser()])
        found[f"rewards.{i}.options"] = _checksums(file for path in _paths(entry.options) for file in _content(path))
        if read is not None:
            found[f"rewards.{i} (weights)"] = _checksums(read[entry.label])
    return found


def _paths(options: Any) -> Iterator[Path]:
    """Yield the files and folders that options name; paths in a run config are absolute."""
    if isinstance(options, Mapping | list):
        for value in options.values() if isinstance(options, Mapping) else options:
            yield from _paths(value)
    elif isinstance(options, str) and (path := Path(options).expanduser()).is_absolute():
        yield path


def _of_model(source: Path | str) -> dict[str, str]:
    """Return the checksums of a model's files: one file, a folder, or a hub id in the cache, with its revision."""
    path, revision = Path(source), {}
    if not path.exists():
        from huggingface_hub import try_to_load_from_cache

        cached = (try_to_load_from_cache(str(source), name) for name in ("model_index.json", "config.json"))
        path = next((Path(file).parent for file in cached if isinstance(file, str)), path)
        revision = {"revision": path.name}
    return revision | _checksums(file for file in _content(path) if file.suffix in _SUFFIXES or file == path)


def _content(path: Path) -> list[Path]:
    """Return a file, or the files in a folder without hidden ones; nothing if there is neither."""
    return [file for file in (path, *sorted(path.rglob("*"))) if file.is_file() and not file.name.startswith(".")]


def _checksums(files: Iterable[Path]) -> dict[str, str]:
    """Return name -> checksum; names have no folders but their own, which differ between machines."""
    found: dict[str, str] = {}
    for file in sorted({file for file in files if file.is_file()}):
        found[unused_name(f"{file.parent.name}/{file.name}", found)] = checksum(file)
    return found
