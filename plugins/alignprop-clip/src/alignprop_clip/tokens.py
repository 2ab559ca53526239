"""Prompts to tokens, cut off as the original does, said once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from alignprop_clip.catalogue import SIGLIP_TOKENIZER
from alignprop_core.errors import WeightsError
from alignprop_core.specs import WeightsFile
from alignprop_core.weights.find import cached


class Tokenizer:
    """open_clip's tokenizer of a model: its byte-pair encoding, or the one from the hub that SigLIP models name.

    Args:
        text_config: open_clip's `text_cfg`.
        name: the model, for messages.

    Raises:
        WeightsError: the tokenizer is one of the hub's, and not on this machine or damaged.
    """

    def __init__(self, text_config: Mapping[str, Any], name: str) -> None:
        self.context_length = int(text_config.get("context_length", 77))
        self._name = name
        self._said = False
        options = dict(text_config.get("tokenizer_kwargs") or {})
        hub_name = text_config.get("hf_tokenizer_name") or ""
        self._tokenize = _from_hub(hub_name, self.context_length, text_config, options) if hub_name else _own(**options)
        self._own = not hub_name

    def __call__(self, prompt: str) -> Tensor:
        """Return (1, context_length) token ids. What does not fit is cut off, with one warning for all prompts."""
        if not self._said and (length := self._length(prompt)) > self.context_length:
            self._said = True
            warnings.warn(
                f"A prompt has {length} tokens and {self._name} reads {self.context_length}: the end of long prompts "
                f'is not scored (said once). It begins "{prompt[:60]}".',
                stacklevel=2,
            )
        tokens: Tensor = self._tokenize([prompt], context_length=self.context_length)
        return tokens

    def _length(self, prompt: str) -> int:
        if self._own:
            return len(self._tokenize.encode(prompt)) + 2  # and the tokens for start and end
        cleaned = self._tokenize.clean_fn(prompt)
        return len(self._tokenize.tokenizer(cleaned, verbose=False).input_ids)


@cache
def _own(**options: Any) -> Any:
    """Return open_clip's own tokenizer; reading its 49,408 tokens takes a moment, so once for all models."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(**options)


def _from_hub(name: str, context_length: int, text_config: Mapping[str, Any], options: dict[str, Any]) -> Any:
    from open_clip.tokenizer import HFTokenizer

    folder = _folder(name)
    try:
        return HFTokenizer(
            str(folder),
            context_length=context_length,
            tokenizer_mode=text_config.get("tokenizer_mode"),
            local_files_only=True,
            **options,
        )
    except Exception as error:  # transformers raises whatever a broken file makes it trip over
        raise WeightsError(
            f"The tokenizer {name} cannot be loaded from {folder}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}. If its files are damaged, delete them and fetch them again with "
            f"{_command(name, _needed(name))}."
        ) from error


def _folder(name: str) -> Path:
    """Return the folder that holds a tokenizer's files: the hub cache's, or one that is named by its absolute path.

    transformers gets the folder, not the hub's name: with the name it wants a config.json too, which no one needs.
    And it gets no folder without tokenizer.json, from which it would make an empty tokenizer without a word.
    """
    files = {file: _find(name, file) for file in _needed(name)}
    if missing := [file for file, path in files.items() if path is None]:
        raise WeightsError(
            f"The tokenizer {name} is not on this machine: {', '.join(missing)} of that repository. Fetch with "
            f"{_command(name, missing)}."
        )
    return next(path.parent for path in files.values() if path is not None)


def _find(name: str, file: str) -> Path | None:
    if Path(name).is_absolute():
        return path if (path := Path(name) / file).is_file() else None
    return cached(WeightsFile(repository=name, file=file))


def _needed(name: str) -> list[str]:
    return [file.file for file in SIGLIP_TOKENIZER if file.repository == name] or [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def _command(name: str, files: Iterable[str]) -> str:
    if name == SIGLIP_TOKENIZER[0].repository:
        return "`alignprop rewards fetch siglip_score`"
    return ", ".join(f"`alignprop rewards fetch hub:{name}/{file}`" for file in files)
