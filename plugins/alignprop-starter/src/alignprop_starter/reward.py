"""`scene_accuracy`: whether the image shows what the prompt asks for, according to the judge."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from alignprop_core.errors import PromptError
from alignprop_core.reward import ImageBatch, Reward
from alignprop_starter.config import SceneAccuracyConfig
from alignprop_starter.judge import ATTRIBUTES, load_judge
from alignprop_starter.vocabulary import BACKGROUNDS, SPECIES, STYLES, WORDS, Request, plural, read_caption

_NAMES: Mapping[str, tuple[str, ...]] = {"species": SPECIES, "style": STYLES, "background": BACKGROUNDS}
_KEYS = {"species": "animal", "style": "style", "background": "background"}
_NOUNS = {plural(name): name for name in SPECIES} | {name: name for name in SPECIES}
_OPEN_WORDS = frozenset(WORDS) | frozenset(STYLES) | {
    "animal", "animals", "and", "of", "with", "is", "scene", "picture", "photo", "image", "drawing", "painting"
}  # fmt: skip
"""Words of a prompt that do not ask for an animal."""


class SceneAccuracy(Reward):
    """1 if the judge recognizes what the prompt asks for, else 0; no gradient, for evaluation only.

    The expected attributes are parsed from the prompt. The metadata keys `animal`, `number`, `style` and `background`
    take precedence. An attribute that the prompt does not name ("a fox" names no place) counts as correct. If the
    animal is compared, a prompt with an animal that the judge does not know ("a unicorn") raises an error. The judge
    was trained on rendered scenes, so its results on other images mean little.
    """

    Config = SceneAccuracyConfig
    config: SceneAccuracyConfig

    def __init__(self, config: SceneAccuracyConfig | None = None) -> None:
        super().__init__(config)
        self.judge = load_judge()

    @property
    def compared(self) -> tuple[str, ...]:
        """Names of the attributes that are compared."""
        return tuple(ATTRIBUTES) if self.config.attribute == "all" else (self.config.attribute,)

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        """Raise `PromptError` if the sample asks for something that the judge does not know, such as "a unicorn"."""
        for attribute in self.compared:
            if attribute in _KEYS:
                _check(attribute, prompt, metadata)

    @torch.no_grad()
    def score(self, batch: ImageBatch) -> Tensor:
        """Return ones and zeros, shape (B,); float32, or float64 if the images are float64.

        Raises:
            PromptError: a sample asks for an animal, style or place that the judge does not know.
        """
        dtype = torch.float64 if batch.images.dtype == torch.float64 else torch.float32
        seen = {name: values.tolist() for name, values in self.judge.read(batch.images.float()).items()}
        scores = []
        for row, (prompt, metadata) in enumerate(zip(batch.prompts, batch.metadata, strict=True)):
            self.check_prompt(prompt, metadata)
            request = request_of(prompt, metadata)
            scores.append(float(all(_fulfilled(request, name, seen[name][row]) for name in self.compared)))
        return torch.tensor(scores, dtype=dtype, device=batch.images.device)


def request_of(prompt: str, metadata: Mapping[str, Any]) -> Request:
    """Return what a sample asks for; its metadata take precedence over the words of its prompt."""
    words = read_caption(prompt)
    return Request(
        species=metadata.get("animal", words.species),
        number=metadata.get("number", words.number),
        style=metadata.get("style", words.style),
        background=metadata.get("background", words.background),
    )


def _fulfilled(request: Request, attribute: str, seen: int) -> bool:
    wanted = getattr(request, attribute)
    if wanted is None:
        return True
    return bool(seen == wanted if attribute == "number" else _NAMES[attribute][seen] == wanted)


def _check(attribute: str, prompt: str, metadata: Mapping[str, Any]) -> None:
    """Refuse values that the judge does not know. In prompts only animals are checked: other words are ignored."""
    key, known = _KEYS[attribute], _NAMES[attribute]
    value = metadata.get(key)
    if value is not None:
        if value not in known:
            near = _nearest([str(value)]) if attribute == "species" else ""
            raise PromptError(
                f'The metadata key "{key}" of "{_short(prompt)}" is {value!r}, which the judge of scene_accuracy does '
                f"not know.{near or _some(known)}"
            )
        return
    if attribute != "species" or key in metadata or read_caption(prompt).species is not None:
        return
    unknown = [word for word in re.findall(r"[^\W_]+", prompt.lower()) if word not in _OPEN_WORDS]
    if unknown:
        raise PromptError(
            f'The prompt "{_short(prompt)}" names no animal that the judge of scene_accuracy knows.'
            f'{_nearest(unknown) or _some(known)} Name one, give it in the metadata ("animal"), or leave '
            "scene_accuracy out for such prompts."
        )


def _some(known: Sequence[str]) -> str:
    return f" It knows {len(known)}: {', '.join(known[:10])}{', ...' if len(known) > 10 else '.'}"


def _nearest(words: list[str]) -> str:
    for word in words:
        if nearest := get_close_matches(word.lower(), _NOUNS, n=1, cutoff=0.75):
            return f' Did you mean "{_NOUNS[nearest[0]]}"?'
    return ""


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 80 else prompt[:77] + "..."
