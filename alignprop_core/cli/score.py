"""`alignprop score`: what a reward makes of picture files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from alignprop_core.cli import common

if TYPE_CHECKING:
    from torch import Tensor


def score(
    images: list[Path] = typer.Argument(help="Picture files."),
    reward: str = typer.Option(help="A reward's name; `alignprop rewards list` lists them."),
    option: list[str] = typer.Option([], "--option", "-o", metavar="KEY=VALUE", help="One of the reward's options."),
    prompt: str = typer.Option("", help="The prompt the pictures were made from, for rewards that read it."),
    device: str = typer.Option("auto", help="auto, cpu, cuda, cuda:N or mps."),
    json: bool = common.JSON_OPTION,
) -> None:
    """Score pictures with a reward."""
    common.quiet_libraries()
    from alignprop_core.config_input import apply_overrides
    from alignprop_core.errors import UserError
    from alignprop_core.registry import default_registry

    registry = default_registry()
    spec = registry.reward(reward).spec
    if spec.needs_prompts and not prompt:
        raise UserError(f'Reward "{reward}" reads the prompt: give --prompt "...".')
    options = registry.reward_options(reward, apply_overrides({}, option)[0])
    pictures = [read_picture(path) for path in images]
    with common.status(f"loading {reward}"):
        from alignprop_core.mix import Term
        from alignprop_core.training.devices import choose_device

        where = choose_device(device)
        term = Term(label=reward, reward=registry.load_reward(reward, options).to(where), differentiable=False)

    import torch

    from alignprop_core.reward import ImageBatch

    with torch.no_grad():
        # One by one: pictures may differ in size.
        scores = [
            float(term.score(ImageBatch(images=picture.to(where), prompts=[prompt], metadata=[{}]))[0])
            for picture in pictures
        ]
    if json:
        pairs = [{"image": str(path), "score": value} for path, value in zip(images, scores, strict=True)]
        common.print_json({"reward": reward, "unit": spec.unit, "scores": pairs})
        return
    title = f"{reward} ({spec.unit})" if spec.unit else reward
    common.print_table(["image", title], [[path, f"{s:.6g}"] for path, s in zip(images, scores, strict=True)])


def read_picture(path: Path) -> Tensor:
    """Return a picture file as (1, 3, H, W), float32 in [0, 1]; transparency is laid on white."""
    import numpy as np
    import torch
    from PIL import Image, UnidentifiedImageError

    from alignprop_core.errors import UserError

    try:
        with Image.open(path) as file:
            picture = file.convert("RGBA")
    except FileNotFoundError:
        raise UserError(f"{path}: no such picture.") from None
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise UserError(f"{path} is no picture that can be read: {error}.") from error
    paper = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    pixels = np.array(Image.alpha_composite(paper, picture).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
