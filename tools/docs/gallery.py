"""Write the gallery: images of the starter model, scored by each shipped reward.

    python tools/docs/gallery.py

Generates 60 images with the starter model, scores them with every differentiable reward of this repository, and writes
the lowest and highest of each to docs/gallery.md (between `<!-- begin images -->` and `<!-- end images -->`) and
docs/images/gallery/. It takes minutes on a CPU; no test runs it.
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

from alignprop_core.config.model import SamplingConfig
from alignprop_core.diffusion.loading import load_pipeline
from alignprop_core.diffusion.sampler import Sampler
from alignprop_core.images import to_pil
from alignprop_core.prompts import load_prompts
from alignprop_core.registry.registry import Registry
from alignprop_core.reward import ImageBatch
from alignprop_core.specs import RewardSpec

ROOT = Path(__file__).parents[2]
PAGE, FOLDER = ROOT / "docs" / "gallery.md", ROOT / "docs" / "images" / "gallery"
BEGIN, END = "<!-- begin images -->\n", "<!-- end images -->"
ENDS = 3  # images shown for each end
BATCH = 12
GOOD = SamplingConfig(steps=12, guidance_scale=3.0)
POOR = SamplingConfig(steps=3, guidance_scale=1.0)
SETTINGS = (
    (GOOD, ("_full", "_number", "_style", "_background"), 2),
    (POOR, ("_full", "_number"), 1),
)
"""Sampling settings, the held-out prompt sets they are used for, and the number of images per prompt."""

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Shown:
    """A reward's options in the gallery, and the images it can score.

    Attributes:
        options: as in a run config; a folder is relative to the repository.
        applies: whether the reward can score an image whose prompt has this metadata.
        note: printed on the page if some images are left out.
    """

    options: dict[str, Any] = field(default_factory=dict)
    applies: Callable[[Facts], bool] = lambda facts: True
    note: str = ""


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
        "Only images whose prompt names a number.",
    ),
    "object_presence": Shown({**STARTER, "source": "metadata", "object_key": "animal"}),
    "pickscore": Shown(STARTER),
    "reference_similarity": Shown({**STARTER, "folder": "examples/reference_images"}),
    "siglip_score": Shown(STARTER),
}
"""The rewards of this repository with a gradient; a test checks that the list is complete."""


@dataclass(frozen=True)
class Images:
    """The generated images.

    Attributes:
        images: (N, 3, 128, 128) float32 in [0, 1].
        prompts: N prompts.
        facts: N mappings: the metadata of each prompt.
        steps: N numbers of denoising steps.
    """

    images: Tensor
    prompts: Sequence[str]
    facts: Sequence[Facts]
    steps: Sequence[int]


@torch.no_grad()
def generate(registry: Registry) -> Images:
    """Sample the starter model on its held-out prompts; the images are the same every time."""
    pipeline = load_pipeline("starter", registry=registry)
    images: list[Tensor] = []
    prompts: list[str] = []
    facts: list[Facts] = []
    steps: list[int] = []
    for settings, endings, repeats in SETTINGS:
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
    return Images(torch.cat(images), prompts, facts, steps)


@torch.no_grad()
def scores(name: str, shown: Shown, made: Images, registry: Registry) -> dict[int, float]:
    """Return the score of each image the reward can score, by the image's index."""
    options = dict(shown.options)
    if "folder" in options:
        options["folder"] = str(ROOT / options["folder"])
    reward = registry.load_reward(name, options)
    scored = [number for number, facts in enumerate(made.facts) if shown.applies(facts)]
    found: dict[int, float] = {}
    for start in range(0, len(scored), BATCH):
        part = scored[start : start + BATCH]
        batch = ImageBatch(
            images=made.images[part],
            prompts=[made.prompts[number] for number in part],
            metadata=[made.facts[number] for number in part],
        )
        found |= zip(part, reward(batch).tolist(), strict=True)
    return found


def section(spec: RewardSpec, shown: Shown, found: Mapping[int, float], made: Images) -> str:
    """Return a reward's section of the page."""
    order = sorted(found, key=lambda number: found[number])
    ends = (order[:ENDS], order[-ENDS:])
    options = yaml.safe_dump(shown.options, default_flow_style=True, sort_keys=False, width=200).strip()
    unit = f" ({spec.unit})" if spec.unit else ""
    lines = [
        f"## {spec.name}",
        "",
        f"{spec.summary} Options: `{options}`. {shown.note}".rstrip(),
        "",
        f"| lowest of {len(found)}{unit} |{' |' * (ENDS - 1)} highest |{' |' * (ENDS - 1)}",
        "| --- " * (2 * ENDS) + "|",
    ]
    cells, words = [], []
    for number in (*ends[0], *ends[1]):
        caption = made.prompts[number] + (", 3 steps" if made.steps[number] == POOR.steps else "")
        cells.append(f"![{caption}](images/gallery/{number:02}.webp)")
        words.append(f"**{_written(found[number])}** {caption}")
    lines += [f"| {' | '.join(row)} |" for row in (cells, words)]
    return "\n".join([*lines, ""])


def _written(score: float) -> str:
    """Write a score with three decimals, or with two digits where those would all be zero."""
    return f"{score:.3f}" if abs(score) >= 0.001 else f"{score:.1e}"


def main() -> None:
    """Generate and score the images; write the page and the image files."""
    registry = Registry.discover({})
    made = generate(registry)
    sections, used = [], set[int]()
    for name, shown in REWARDS.items():
        found = scores(name, shown, made, registry)
        order = sorted(found, key=lambda number: found[number])
        used |= {*order[:ENDS], *order[-ENDS:]}
        sections.append(section(registry.reward(name).spec, shown, found, made))
        sys.stdout.write(f"{name}: {found[order[0]]:.3f} to {found[order[-1]]:.3f}\n")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in FOLDER.glob("*.webp"):
        old.unlink()
    for number in sorted(used):
        to_pil(made.images[number]).save(FOLDER / f"{number:02}.webp", quality=82, method=6)
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    whole = "\n".join(sections)
    PAGE.write_text(f"{head}{BEGIN}\n{whole}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
