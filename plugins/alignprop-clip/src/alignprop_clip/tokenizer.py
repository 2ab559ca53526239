"""Tokenizer of a CLIP model: truncates like the original implementation, and warns once about truncation."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from alignprop_clip.pretrained import SIGLIP_TOKENIZER
from alignprop_core.errors import WeightsError, complaint
from alignprop_core.specs import WeightsFile
from alignprop_core.weights.find import cached


class Tokenizer:
    """open_clip's tokenizer of a model: its byte-pair encoding, or a hub tokenizer, as SigLIP models use.

    Args:
        text_config: open_clip's `text_cfg`.
        name: the model, for messages.

    Raises:
        WeightsError: a hub tokenizer is not on this machine, or is damaged.
    """

    def __init__(self, text_config: Mapping[str, Any], name: str) -> None:
        self.context_length = int(text_config.get("context_length", 77))
        self._name = name
        self._warned = False
        options = dict(text_config.get("tokenizer_kwargs") or {})
        hub_name = text_config.get("hf_tokenizer_name") or ""
        self._tokenize = (
            _hub_tokenizer(hub_name, self.context_length, text_config, options)
            if hub_name
            else _bpe_tokenizer(**options)
        )
        self._is_bpe = not hub_name

    def __call__(self, prompt: str) -> Tensor:
        """Return (1, context_length) token ids, truncated; the first truncation shows a warning."""
        if not self._warned and (length := self._length(prompt)) > self.context_length:
            self._warned = True
            warnings.warn(
                f"A prompt has {length} tokens and {self._name} reads {self.context_length}: longer prompts are "
                f'truncated before scoring (shown once). The prompt starts with "{prompt[:60]}".',
                stacklevel=2,
            )
        tokens: Tensor = self._tokenize([prompt], context_length=self.context_length)
        return tokens

    def _length(self, prompt: str) -> int:
        if self._is_bpe:
            return len(self._tokenize.encode(prompt)) + 2  # + start and end tokens
        cleaned = self._tokenize.clean_fn(prompt)
        return len(self._tokenize.tokenizer(cleaned, verbose=False).input_ids)


@cache
def _bpe_tokenizer(**options: Any) -> Any:
    """Return open_clip's own tokenizer, cached: reading its 49,408 tokens is slow."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(**options)


def _hub_tokenizer(name: str, context_length: int, text_config: Mapping[str, Any], options: dict[str, Any]) -> Any:
    from open_clip.tokenizer import HFTokenizer

    folder = _tokenizer_folder(name)
    try:
        return HFTokenizer(
            str(folder),
            context_length=context_length,
            tokenizer_mode=text_config.get("tokenizer_mode"),
            local_files_only=True,
            **options,
        )
    except Exception as error:  # transformers raises many types for a damaged file
        raise WeightsError(
            f"The tokenizer {name} cannot be loaded from {folder}: {complaint(error)}. If its files are damaged, "
            f"delete them and fetch them again with {_fetch_command(name, _required_files(name))}."
        ) from error


def _tokenizer_folder(name: str) -> Path:
    """Return the folder with a tokenizer's files: in the hub cache, or `name` itself if it is an absolute path.

    transformers is given the folder and not the hub name, because with the name it also requires a config.json. All
    files are checked first: from a folder without tokenizer.json transformers silently builds an empty tokenizer.
    """
    files = {file: _find_file(name, file) for file in _required_files(name)}
    if missing := [file for file, path in files.items() if path is None]:
        raise WeightsError(
            f"The tokenizer {name} is not on this machine: {', '.join(missing)} of that repository. Fetch it with "
            f"{_fetch_command(name, missing)}."
        )
    return next(path.parent for path in files.values() if path is not None)


def _find_file(name: str, file: str) -> Path | None:
    if Path(name).is_absolute():
        return path if (path := Path(name) / file).is_file() else None
    return cached(WeightsFile(repository=name, file=file))


def _required_files(name: str) -> list[str]:
    return [file.file for file in SIGLIP_TOKENIZER if file.repository == name] or [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def _fetch_command(name: str, files: Iterable[str]) -> str:
    if name == SIGLIP_TOKENIZER[0].repository:
        return "`alignprop rewards fetch siglip_score`"
    return ", ".join(f"`alignprop rewards fetch hub:{name}/{file}`" for file in files)
