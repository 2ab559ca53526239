"""Write the gallery: pictures of the starter model, and what each shipped reward makes of them.

    python docs/gallery.py

Draws 60 pictures from the starter model, scores them with every differentiable reward of this repository, and writes
the lowest and highest of each into gallery.md (between `<!-- begin pictures -->` and `<!-- end pictures -->`) and
images/gallery/. It takes minutes on a CPU; no test runs it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from alignprop_core.config import SamplingConfig
from alignprop_core.diffusion import Sampler, load_pipeline
from alignprop_core.evaluation.sheet import to_picture
from alignprop_core.prompts import load_prompts
from alignprop_core.registry import Registry
from alignprop_core.reward import ImageBatch
from alignprop_core.specs import RewardSpec

DOCS = Path(__file__).parent
PAGE, PICTURES = DOCS / "gallery.md", DOCS / "images" / "gallery"
BEGIN, END = "<!-- begin pictures -->\n", "<!-- end pictures -->"
ENDS = 3  # pictures shown of each end
BATCH = 12
GOOD = SamplingConfig(steps=12, guidance_scale=3.0)
POOR = SamplingConfig(steps=3, guidance_scale=1.0)
DRAWN = (
    (GOOD, ("_full", "_number", "_style", "_background"), 2),
    (POOR, ("_full", "_number"), 1),
)
"""How to sample, which of the held-out prompt sets, and how many pictures of each prompt."""

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Shown:
    """A reward's options in the gallery, and which pictures it can judge.

    Attributes:
        options: as in a run config; a folder stands relative to the repository.
        judges: whether the reward can say something of a picture whose prompt has these facts.
        why: said on the page where that leaves pictures out.
    """

    options: dict[str, Any] = field(default_factory=dict)
    judges: Callable[[Facts], bool] = lambda facts: True
    why: str = ""


STARTER = {"weights": "starter"}
REWARDS: dict[str, Shown] = {
    "aesthetic": Shown(STARTER),
    "clip_score": Shown(STARTER),
    "hpsv2": Shown(STARTER),
    "image_classifier": Shown(
        {"model": "efficientnet-lite0", "metadata_key": "animal"},
        lambda facts: facts["animal"] != "octopus",
        "ImageNet has no octopus.",
    ),
    "jpeg_compressibility": Shown({"quality": 95}),
    "jpeg_incompressibility": Shown({"quality": 95}),
    "object_absence": Shown({**STARTER, "source": "config", "objects": ["snail", "lobster"]}),
    "object_count": Shown(
        {**STARTER, "source": "metadata", "object_key": "animal"},
        lambda facts: "number" in facts,
        "Of the pictures whose prompt names a number.",
    ),
    "object_presence": Shown({**STARTER, "source": "metadata", "object_key": "animal"}),
    "pickscore": Shown(STARTER),
    "reference_similarity": Shown({**STARTER, "folder": "examples/reference_pictures"}),
    "siglip_score": Shown(STARTER),
}
"""The rewards of this repository with a gradient; a test holds the list complete."""


@dataclass(frozen=True)
class Pictures:
    """What was drawn.

    Attributes:
        images: (N, 3, 128, 128) float32 in [0, 1].
        prompts: N prompts.
        facts: N mappings: what the prompt file says beside each.
        steps: N numbers of denoising steps.
    """

    images: Tensor
    prompts: Sequence[str]
    facts: Sequence[Facts]
    steps: Sequence[int]


@torch.no_grad()
def draw(registry: Registry) -> Pictures:
    """Sample the starter model over its held-out prompts, the same pictures every time."""
    pipeline = load_pipeline("starter", registry=registry)
    images: list[Tensor] = []
    prompts: list[str] = []
    facts: list[Facts] = []
    steps: list[int] = []
    for settings, endings, repeats in DRAWN:
        sampler = Sampler(pipeline, settings)
        sets = [load_prompts(f"starter/eval_simple_animals{ending}", registry) for ending in endings]
        texts = [text for one in sets for text in one.prompts] * repeats
        for start in range(0, len(texts), BATCH):
            part = texts[start : start + BATCH]
            numbers = range(len(prompts) + start, len(prompts) + start + len(part))
            noise = sampler.noise(seed=0, step=0, indices=numbers)
            images.append(sampler.decode(sampler.sample(part, noise).latents))
        prompts += texts
        facts += [about for one in sets for about in one.metadata] * repeats
        steps += [settings.steps] * len(texts)
    return Pictures(torch.cat(images), prompts, facts, steps)


@torch.no_grad()
def scores(name: str, shown: Shown, pictures: Pictures, registry: Registry) -> dict[int, float]:
    """Return the score of each picture the reward can judge, by the picture's number."""
    options = dict(shown.options)
    if "folder" in options:
        options["folder"] = str(DOCS.parent / options["folder"])
    reward = registry.load_reward(name, options)
    judged = [number for number, facts in enumerate(pictures.facts) if shown.judges(facts)]
    found: dict[int, float] = {}
    for start in range(0, len(judged), BATCH):
        part = judged[start : start + BATCH]
        batch = ImageBatch(
            images=pictures.images[part],
            prompts=[pictures.prompts[number] for number in part],
            metadata=[pictures.facts[number] for number in part],
        )
        found |= zip(part, reward(batch).tolist(), strict=True)
    return found


def section(spec: RewardSpec, shown: Shown, found: Mapping[int, float], pictures: Pictures) -> str:
    """Return a reward's part of the page."""
    order = sorted(found, key=lambda number: found[number])
    ends = (order[:ENDS], order[-ENDS:])
    options = yaml.safe_dump(shown.options, default_flow_style=True, sort_keys=False, width=200).strip()
    unit = f" ({spec.unit})" if spec.unit else ""
    lines = [
        f"## {spec.name}",
        "",
        f"{spec.summary} Options: `{options}`. {shown.why}".rstrip(),
        "",
        f"| lowest of {len(found)}{unit} |{' |' * (ENDS - 1)} highest |{' |' * (ENDS - 1)}",
        "| --- " * (2 * ENDS) + "|",
    ]
    cells, words = [], []
    for number in (*ends[0], *ends[1]):
        told = pictures.prompts[number] + (", 3 steps" if pictures.steps[number] == POOR.steps else "")
        cells.append(f"![{told}](images/gallery/{number:02}.webp)")
        words.append(f"**{_written(found[number])}** {told}")
    lines += [f"| {' | '.join(row)} |" for row in (cells, words)]
    return "\n".join([*lines, ""])


def _written(score: float) -> str:
    """Write a score with three decimals, or with two digits where those would all be zero."""
    return f"{score:.3f}" if abs(score) >= 0.001 else f"{score:.1e}"


def main() -> None:
    """Draw, score, and write page and pictures."""
    registry = Registry.discover({})
    pictures = draw(registry)
    sections, used = [], set[int]()
    for name, shown in REWARDS.items():
        found = scores(name, shown, pictures, registry)
        order = sorted(found, key=lambda number: found[number])
        used |= {*order[:ENDS], *order[-ENDS:]}
        sections.append(section(registry.reward(name).spec, shown, found, pictures))
        sys.stdout.write(f"{name}: {found[order[0]]:.3f} to {found[order[-1]]:.3f}\n")
    PICTURES.mkdir(parents=True, exist_ok=True)
    for old in PICTURES.glob("*.webp"):
        old.unlink()
    for number in sorted(used):
        to_picture(pictures.images[number]).save(PICTURES / f"{number:02}.webp", quality=82, method=6)
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    whole = "\n".join(sections)
    PAGE.write_text(f"{head}{BEGIN}\n{whole}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
