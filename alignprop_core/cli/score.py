"""`alignprop score`: score image files with rewards."""

from __future__ import annotations

import math
from pathlib import Path

import typer

from alignprop_core.cli import common


def score(
    images: list[Path] = typer.Argument(help="Image files."),
    reward: list[str] = typer.Option(help="A reward's name, see `alignprop rewards list`; can be repeated."),
    option: list[str] = common.REWARD_OPTIONS,
    prompt: str | None = typer.Option(None, help="The prompt of the images, for rewards that read it."),
    device: str = common.DEVICE_OPTION,
    json: bool = common.JSON_OPTION,
) -> None:
    """Score image files with one or more rewards."""
    common.quiet_libraries()
    from alignprop_core.cli.inputs import device_of, reward_entries
    from alignprop_core.errors import RewardError, UserError
    from alignprop_core.images import read_image
    from alignprop_core.registry.registry import default_registry

    registry = default_registry()
    entries = reward_entries(reward, option, registry)
    specs = [registry.reward(entry.name).spec for entry in entries]
    for entry, spec in zip(entries, specs, strict=True):
        if spec.needs_prompts and prompt is None:
            raise UserError(f'Reward "{entry.name}" reads the prompt: give --prompt "...".')
    pixels = [read_image(path) for path in images]
    where = device_of(device)

    import torch

    from alignprop_core.mix.load import load_terms
    from alignprop_core.reward import ImageBatch

    with common.status(f"loading {', '.join(reward)}"):
        terms = load_terms(entries, registry)
        for term in terms:
            term.reward.to(where)
    rows = []
    with torch.no_grad():
        for path, array in zip(images, pixels, strict=True):
            # One at a time: images may differ in size.
            image = torch.from_numpy(array).permute(2, 0, 1)[None].float().to(where) / 255
            batch = ImageBatch(images=image, prompts=[prompt or ""], metadata=[{}])
            row = [float(term.score(batch)[0]) for term in terms]
            for term, value in zip(terms, row, strict=True):
                if not math.isfinite(value):
                    raise RewardError(f'Reward "{term.label}" scores {path} as {value}. Are its weights damaged?')
            rows.append(row)
    labels = [term.label for term in terms]
    if json:
        scored = [
            {"image": str(path), "scores": dict(zip(labels, row, strict=True))}
            for path, row in zip(images, rows, strict=True)
        ]
        units = {label: spec.unit for label, spec in zip(labels, specs, strict=True)}
        common.print_json({"units": units, "images": scored})
        return
    titles = [f"{label} ({spec.unit})" if spec.unit else label for label, spec in zip(labels, specs, strict=True)]
    common.print_table(
        ["image", *titles],
        [[path, *(f"{value:.6g}" for value in row)] for path, row in zip(images, rows, strict=True)],
    )
