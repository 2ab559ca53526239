"""`alignprop score`: score image files with rewards."""

from __future__ import annotations

import math
from pathlib import Path

import typer

from alignprop_core.cli import common
from alignprop_core.errors import RewardError, UserError


def score(
    images: list[Path] = typer.Argument(metavar="IMAGE|FOLDER", help="Image files, and folders of images."),
    reward: list[str] = typer.Option(help="A reward's name, see `alignprop rewards list`; can be repeated."),
    option: list[str] = common.REWARD_OPTIONS,
    prompt: str | None = typer.Option(None, help="The prompt of the images, for rewards that read it."),
    device: str = common.DEVICE_OPTION,
    json: bool = common.JSON_OPTION,
) -> None:
    """Score image files with one or more rewards."""
    common.quiet_libraries()
    from alignprop_core.cli.inputs import device_of, reward_entries
    from alignprop_core.images import read_image
    from alignprop_core.registry.registry import default_registry

    registry = default_registry()
    entries = reward_entries(reward, option, registry)
    specs = [registry.reward(entry.name).spec for entry in entries]
    for entry, spec in zip(entries, specs, strict=True):
        if spec.needs_prompts and prompt is None:
            raise UserError(f'Reward "{entry.name}" reads the prompt: give --prompt "...".')
    images = [file for path in images for file in (_images_in(path) if path.is_dir() else [path])]
    pixels = [read_image(path) for path in images]
    where = device_of(device)

    import torch

    from alignprop_core.mix.load import load_terms
    from alignprop_core.reward import ImageBatch

    with common.status(f"loading {', '.join(reward)}"):
        terms = load_terms(entries, registry)
        for term in terms:
            term.reward.to(where)
    rows: list[tuple[Path, dict[str, float]]] = []
    with torch.no_grad():
        for path, array in zip(images, pixels, strict=True):
            # One at a time: images may differ in size.
            image = torch.from_numpy(array).permute(2, 0, 1)[None].float().to(where) / 255
            batch = ImageBatch(images=image, prompts=[prompt or ""], metadata=[{}])
            scores = {term.label: float(term.score(batch)[0]) for term in terms}
            for label, value in scores.items():
                if not math.isfinite(value):
                    raise RewardError(f'Reward "{label}" scores {path} as {value}. Are its weights damaged?')
            rows.append((path, scores))
    units = {term.label: spec.unit for term, spec in zip(terms, specs, strict=True)}
    if json:
        common.print_json({"units": units, "images": [{"image": path, "scores": scores} for path, scores in rows]})
        return
    titles = [f"{label} ({unit})" if unit else label for label, unit in units.items()]
    table = [[path, *(f"{value:.6g}" for value in scores.values())] for path, scores in rows]
    common.print_table(["image", *titles], table)


def _images_in(folder: Path) -> list[Path]:
    from alignprop_core.images import SUFFIXES

    found = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"{folder} is a folder without images ({', '.join(SUFFIXES)}).")
    return found
