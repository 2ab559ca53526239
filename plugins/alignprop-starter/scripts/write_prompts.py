"""Writes the prompt sets: AlignProp's animals by name, and with number, style, place, and all three.

    python plugins/alignprop-starter/scripts/write_prompts.py [--out DIR]

The values of an attribute are used in a fixed order, so that each occurs equally often and consecutive prompts differ.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from training_common import PACKAGE

from alignprop_starter import VARIANTS
from alignprop_starter.vocabulary import BACKGROUNDS, HELDOUT_ANIMALS, MAX_NUMBER, STYLES, TRAIN_ANIMALS, caption


def prompt_set(animals: tuple[str, ...], variant: str) -> list[dict[str, object]]:
    """Return the lines of a set: prompt, animal, and the other attributes of the variant."""
    lines = []
    for i, animal in enumerate(animals):
        requests: dict[str, object] = {}
        if variant in ("_number", "_full"):
            requests["number"] = 1 + i % MAX_NUMBER
        if variant in ("_style", "_full"):
            requests["style"] = STYLES[i % len(STYLES)]
        if variant in ("_background", "_full"):
            # 5 and the number of places have no common factor: all places occur, in another order than the numbers.
            requests["background"] = BACKGROUNDS[5 * i % len(BACKGROUNDS)]
        text = caption(animal, **requests)  # type: ignore[arg-type]
        lines.append({"prompt": text, "animal": animal, **requests})
    return lines


def scenes(animals: tuple[str, ...], count: int) -> list[dict[str, object]]:
    """Return the lines of `animal_scenes` and `eval_animal_scenes`: each animal in several numbers and places.

    Intervals of an evaluation are over prompts, so that many prompts say more than many images of a few.
    """
    lines = []
    for k in range(count):
        animal, requests = (
            animals[k % len(animals)],
            {
                "number": 1 + (k + k // 12) % MAX_NUMBER,
                "background": BACKGROUNDS[(5 * k + k // 8) % len(BACKGROUNDS)],
            },
        )
        text = caption(animal, **requests)  # type: ignore[arg-type]
        lines.append({"prompt": text, "animal": animal, **requests})
    return lines


def main() -> None:
    """Write all sets."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=PACKAGE / "prompts")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, animals in (("simple_animals", TRAIN_ANIMALS), ("eval_simple_animals", HELDOUT_ANIMALS)):
        for variant in VARIANTS:
            lines = [json.dumps(line) for line in prompt_set(animals, variant)]
            (args.out / f"{name}{variant}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, animals, count in (("animal_scenes", TRAIN_ANIMALS, 90), ("eval_animal_scenes", HELDOUT_ANIMALS, 36)):
        lines = [json.dumps(line) for line in scenes(animals, count)]
        (args.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
