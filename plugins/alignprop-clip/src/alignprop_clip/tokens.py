"""Prompts to tokens, cut off as the original does, said once."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor

from alignprop_core.errors import WeightsError


class Tokenizer:
    """open_clip's tokenizer of a model: its byte-pair encoding, or the one from the hub that SigLIP models name.

    Args:
        text_config: open_clip's `text_cfg`.
        name: the model, for messages.

    Raises:
        WeightsError: the tokenizer is one of the hub's and not on this machine.
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

    try:
        return HFTokenizer(
            name,
            context_length=context_length,
            tokenizer_mode=text_config.get("tokenizer_mode"),
            local_files_only=True,
            **options,
        )
    except (OSError, ValueError) as error:
        files = "tokenizer.json, tokenizer_config.json and special_tokens_map.json"
        raise WeightsError(
            f"The tokenizer {name} is not on this machine ({files} of that repository). Fetch each with `alignprop "
            f"rewards fetch hub:{name}/FILE`."
        ) from error
