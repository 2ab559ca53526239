"""The judge as a measure: does the picture show what the prompt asks for?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from alignprop_core.reward import ImageBatch, Reward
from alignprop_starter.config import SceneAccuracyConfig
from alignprop_starter.judge import ATTRIBUTES, load_judge
from alignprop_starter.vocabulary import BACKGROUNDS, SPECIES, STYLES, Wish, read_caption

_NAMES: Mapping[str, tuple[str, ...]] = {"species": SPECIES, "style": STYLES, "background": BACKGROUNDS}


class SceneAccuracy(Reward):
    """1 where the judge sees what the prompt asks for, 0 where it does not; an evaluation-only measure.

    A wish is read from the prompt's words; the metadata keys `animal`, `number`, `style` and `background` come before
    them. A prompt that leaves the attribute open ("a fox" names no place) scores 1: nothing was asked, nothing is
    wrong. The judge was trained on rendered scenes; what it says of other pictures means little.
    """

    Config = SceneAccuracyConfig
    config: SceneAccuracyConfig

    def __init__(self, config: SceneAccuracyConfig | None = None) -> None:
        super().__init__(config)
        self.judge = load_judge()

    @torch.no_grad()
    def score(self, batch: ImageBatch) -> Tensor:
        """Return (B,) ones and zeros; float32, or float64 if the images are."""
        dtype = torch.float64 if batch.images.dtype == torch.float64 else torch.float32
        seen = {name: values.tolist() for name, values in self.judge.read(batch.images.float()).items()}
        asked = ATTRIBUTES if self.config.attribute == "all" else (self.config.attribute,)
        scores = []
        for row, (prompt, metadata) in enumerate(zip(batch.prompts, batch.metadata, strict=True)):
            wish = wish_of(prompt, metadata)
            scores.append(float(all(_fulfilled(wish, name, seen[name][row]) for name in asked)))
        return torch.tensor(scores, dtype=dtype, device=batch.images.device)


def wish_of(prompt: str, metadata: Mapping[str, Any]) -> Wish:
    """Return what a sample asks for: its metadata first, then the words of its prompt."""
    words = read_caption(prompt)
    return Wish(
        species=metadata.get("animal", words.species),
        number=metadata.get("number", words.number),
        style=metadata.get("style", words.style),
        background=metadata.get("background", words.background),
    )


def _fulfilled(wish: Wish, attribute: str, seen: int) -> bool:
    wanted = getattr(wish, attribute)
    if wanted is None:
        return True
    return bool(seen == wanted if attribute == "number" else _NAMES[attribute][seen] == wanted)
