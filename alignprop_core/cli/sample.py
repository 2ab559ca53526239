"""`alignprop sample`: generate images with a model and a LoRA."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import typer

from alignprop_core.cli import common
from alignprop_core.errors import UserError, under


def sample(
    prompts: list[str] = typer.Argument(
        None, metavar="RUN|PROMPT", help="A run folder, then prompts; --run or --model replaces the folder."
    ),
    run: Path | None = typer.Option(None, help="A run folder: its model, LoRA and sampling settings."),
    model: str = typer.Option("", help=f"Instead of a run, or of its model: {common.MODELS}."),
    lora: Path | None = typer.Option(None, help="A LoRA file or folder; with --run, instead of the run's result."),
    prompts_from: str = typer.Option("", "--prompts", help="More prompts: a registered set or a file."),
    compare: bool = typer.Option(False, "--compare", help="Also generate each image without the LoRA, side by side."),
    strength: float = typer.Option(1.0, help="Strength of the LoRA; 0 is the base model."),
    steps: int | None = typer.Option(None, help="Denoising steps; the default is the run's, or 50."),
    guidance_scale: float | None = typer.Option(
        None, help="Classifier-free guidance scale; 1 disables it; the default is the run's, or 7.5."
    ),
    negative_prompt: str | None = typer.Option(None, help="Negative prompt; the default is the run's, or empty."),
    width: int | None = typer.Option(None, help="Width in pixels; the default is the run's or the model's."),
    height: int | None = typer.Option(None, help="Height in pixels; the default is the run's or the model's."),
    seed: int = typer.Option(
        0, min=0, max=common.MAX_SEED, help="Seed of the first image of each prompt; further images use the next seeds."
    ),
    count: int = typer.Option(1, min=1, help="Images per prompt."),
    device: str = common.DEVICE_OPTION,
    output: Path = typer.Option(Path("samples"), help="Folder for the images."),
) -> None:
    """Generate images; a seed gives the same image as in diffusers."""
    common.quiet_libraries()
    from alignprop_core.cli import inputs
    from alignprop_core.prompts import PromptSet, load_prompts, warn_about
    from alignprop_core.registry.registry import default_registry

    registry = default_registry()
    texts = list(prompts or [])
    if run is None and not model and texts and (Path(texts[0]).is_dir() or "/" in texts[0]):
        run = Path(texts.pop(0))
    if run is None and not model:
        raise UserError('Give a run folder before the prompts (alignprop sample RUN "a fox"), or --model M.')
    if prompts_from:
        with under("--prompts"):
            texts += load_prompts(prompts_from, registry).prompts
    if not texts:
        raise UserError("Give at least one prompt, or --prompts FILE.")
    warn_about(PromptSet("the prompts", tuple(texts), ()))
    if compare and run is None and lora is None:
        raise UserError("--compare needs a LoRA: give a run or --lora F.")
    config, source = inputs.chosen_model(run, model, lora, registry, scores=False)
    settings = inputs.sampling_settings(
        config,
        lora,
        registry,
        steps=steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        width=width,
        height=height,
    )
    where = inputs.device_of(device)
    with common.status("loading the model"):
        from alignprop_core.diffusion.sampler import Sampler

        sampler = Sampler.load(**source, sampling=settings, device=where, registry=registry, strength=strength)

    import torch

    from alignprop_core._files import safe_name, unused_name
    from alignprop_core.evaluation.progress import progress_bar
    from alignprop_core.evaluation.sheet import save_image, side_by_side

    variants: list[Any] = [sampler.without_lora, nullcontext] if compare else [nullcontext]
    names: list[str] = []
    for text in texts:
        names.append(unused_name(safe_name(text, longest=60), names))
    # Distinct from the base model's images, which would otherwise be overwritten.
    tuned = "-lora" if strength == 1 else f"-lora-{strength:g}"
    suffix = "-compare" if compare else "" if source["lora"] is None else tuned
    output.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    with progress_bar(common.console(stderr=True)) as bar, torch.no_grad():
        task = bar.add_task("sampling", total=len(texts) * count * len(variants), status="")
        for name, text in zip(names, texts, strict=True):
            for number in range(seed, seed + count):
                images = []
                for switch in variants:
                    with switch():
                        images += sampler([text], seed=number, output="pil")
                    bar.advance(task)
                files.append(output / f"{name}-{number}{suffix}.png")
                save_image(side_by_side(images), files[-1])
    for file in files:
        common.console().print(str(file), soft_wrap=True)
